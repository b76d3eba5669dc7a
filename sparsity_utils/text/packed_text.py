"""The text of a corpus as one compressed file, so that a machine without its source builds the same tokens.

A packed text is JSON lines, compressed by LZMA. The first line has the corpus section of the profile and what was left
out; every other line is one document part. The corpus built from it has the name and the tokens of the one built from
the source.
"""

import json
import lzma
from dataclasses import asdict
from pathlib import Path

from sparsity_utils import paths
from sparsity_utils.console import InputError, progress
from sparsity_utils.text.config import CorpusConfig
from sparsity_utils.text.corpus import Collected, Corpus, Part, collect, corpus_of, request
from sparsity_utils.text.documents import Document
from sparsity_utils.text.sources import open_source

PRESET = 6 | lzma.PRESET_EXTREME


def pack_text(config: CorpusConfig, file: Path) -> None:
    """Read the text that `config` asks for and write it, without duplicates and not yet split, to `file`.

    Raises InputError for a source that cannot be used.
    """
    source = open_source(config)
    text = collect(source, config)
    head = {"request": request(source, config), "skipped": text.skipped, "duplicates": text.duplicates}
    with paths.written_aside(file) as aside, lzma.open(aside, "wt", preset=PRESET, encoding="utf-8") as stream:
        stream.write(json.dumps(head) + "\n")
        for part in progress(text.parts, "Packing text"):
            stream.write(json.dumps([*part.key, part.size, *asdict(part.document).values()]) + "\n")


def unpack_text(config: CorpusConfig, file: Path) -> Corpus:
    """The corpus of a packed text, built if it is not there.

    Raises InputError for a file that is no packed text, is cut short, or was packed for another corpus section.
    """
    try:
        with lzma.open(file, "rt", encoding="utf-8") as stream:
            head = json.loads(next(stream))
            asked = head["request"]
            if asked["config"] != config.settings():
                raise InputError(f"{file} was packed for another corpus section; pack it again with this profile.")
            return corpus_of(asked, config, lambda: Collected(_parts(stream), head["skipped"], head["duplicates"]))
    except InputError:
        raise
    except (OSError, EOFError, lzma.LZMAError, StopIteration, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file} is no whole packed text ({error}); make it with `python -m sparsity_utils corpus --pack`."
        ) from error


def _parts(stream) -> list[Part]:
    rows = (json.loads(line) for line in stream)
    return [Part((digest, place), size, Document(*labels)) for digest, place, size, *labels in rows]
