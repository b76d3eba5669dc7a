"""Prose: what is kept of documentation, by example, and the source that reads it from packages."""

import itertools
import random
import textwrap
from pathlib import Path

import pytest
from corpus_text import install, own_build_folder  # noqa: F401  (a fixture)

from sparsity_utils.text import sources
from sparsity_utils.text.config import CorpusConfig
from sparsity_utils.text.prose import docstrings, prose_paragraphs
from sparsity_utils.text.windows import pinned_documents


def test_docstrings_stand_in_file_order_dedented() -> None:
    source = """
        "Module."
        class A:
            def f(self):
                '''F.

                Args:
                    x: one
                '''
            async def g(self):
                "G \\\\d."
            def silent(self):
                return "not prose"
        def last():
            '''
            Last.
            '''
    """
    wanted = "Module.\n\nF.\n\nArgs:\n    x: one\n\nG \\d.\n\nLast."
    assert docstrings(textwrap.dedent(source)) == wanted
    assert docstrings("def broken(:") == ""


SENTENCE = (
    "The mean of the values is taken over all of the axes that are named, and it is left as it was where none is."
)
DOCSTRING = f"""
Return the mean.

{SENTENCE.replace(" over", chr(10) + "over")}

Parameters
----------
x : array_like
    The values that the mean is taken of, in any form that can be made an array, and so on and so on and so on.

Notes
-----
It is *not* the same as the ``median`` of the :class:`~numpy.ndarray`, see `the book <http://a.org/b>`_ and [1]_ for
what to use, or the [`Trainer`] with :func:`mean() <numpy.mean>`, which **has to be** the one that is used here::

    mean(x) is the same as the sum of the values over the number of the values, which is written as it is here

>>> mean([1, 2]) is the one that we want to have, and it is as good as any of the others that you can have
1.5

.. note:: This is a thing that is not to be read as a text, but it is one of the things that are in the way of it.

- A list is not a text, and it is not to be read as one of the texts that are in the way of it, or is it.

:param x: The values that the mean is taken of, in any form that can be made an array, and so on and so on.

+-----+ A table is not a text, and it is not to be read as one of the texts that are in the way of it, or is it.

Licensed under the terms of a contract that is not to be found in this place, but it is in another of the places.
"""
MARKDOWN = f"""# A heading is not a text, and it is not to be read as one of the texts that are in the way of it.
{SENTENCE} See [the book](http://a.org) for it.

```python
{SENTENCE}

{SENTENCE}
```

| {SENTENCE} |

Ein Satz in einer anderen Sprache ist kein englischer Text und wird deshalb auch nicht als einer gelesen, oder doch.

foo.bar(x_1), foo.bar(x_2), the_name and another_name or the x.y.z of a.b.c is in the d.e.f of a_b and c_d: 1, 2, 3.
"""


def test_of_a_docstring_its_sentences_stay() -> None:
    assert list(prose_paragraphs(DOCSTRING)) == [
        SENTENCE,
        "It is not the same as the median of the numpy.ndarray, see the book and for what to use, or the Trainer with "
        "numpy.mean, which has to be the one that is used here:",
    ]


def test_of_markdown_its_sentences_stay() -> None:
    assert list(prose_paragraphs(MARKDOWN)) == [f"{SENTENCE} See the book for it."]


def essay(number: int) -> str:
    """Sentences that no other essay has, enough for a document."""
    rng = random.Random(number)
    words = ["".join(rng.choices("abcdefghij", k=6)) for _ in range(36)]
    return " ".join(
        f"It is the {a} of the {b} that {c} has to do with." for a, b, c in zip(*[iter(words)] * 3, strict=True)
    )


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    modules = {f"planted/m{n}.py": f'"""{essay(n)}"""\n\ndef f():\n    """{SENTENCE}"""\n'.encode() for n in range(40)}
    files = modules | {
        "planted/README.md": essay(50).encode(),
        "planted/short.rst": SENTENCE.encode(),
        "planted/tests/test_m.txt": essay(51).encode(),
        "planted-1.0.dist-info/licenses/NOTICE.txt": essay(52).encode(),
        "planted-1.0.dist-info/METADATA": f"Name: planted\nVersion: 1.0\n\n{essay(53)}".encode(),
    }
    install(tmp_path / "site", "planted", files)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(sources, "FAMILIES", {"planted family": ("planted",)})
    return tmp_path / "site"


def test_prose_of_a_package_is_of_files_that_give_no_code(package: Path) -> None:
    source = sources.open_source(CorpusConfig("python-prose"))
    prose = {document.name: document.text for document in source.documents}
    assert source.skipped == {"of little prose": 1} and source.identity["packages"] == {"planted": "1.0"}
    code = {document.name for document in pinned_documents("python-source")}
    modules = {name for name in prose if name.endswith(".py")}
    assert modules and code and not modules & code and len(modules | code) == 40
    assert set(prose) - modules == {"planted/README.md", "planted-1.0.dist-info/METADATA"}
    assert all(prose[name].startswith(essay(int(name[9:-3]))) for name in modules)
    assert sum(SENTENCE in text for text in prose.values()) == 1  # the first document that has it keeps it


def test_prose_of_the_pinned_packages() -> None:
    documents = pinned_documents("python-prose", 0.05)
    assert documents == pinned_documents("python-prose", 0.05) and len(documents) >= 10
    assert not {document.name for document in documents} & {d.name for d in pinned_documents("python-source", 0.3)}
    paragraphs = list(itertools.chain(*(document.text.split("\n\n") for document in documents)))
    assert len(set(paragraphs)) == len(paragraphs)
    assert all(len(document.text) >= 500 for document in documents)
    assert not [text for text in paragraphs if ">>>" in text or "\n" in text or "`" in text or len(text.split()) < 16]
    assert 30_000 < sum(len(document.text.encode()) for document in documents) <= 50_000
