"""How many tokens a transformers model takes at once, and how many entries its vocabulary has."""

from torch import nn
from transformers import PreTrainedModel

# What configurations call it. LED and Whisper name the two texts of an encoder-decoder apart.
ENCODER, DECODER = ("max_encoder_position_embeddings",), ("max_decoder_position_embeddings", "max_target_positions")
NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")


def context_length(model: PreTrainedModel, decoder: bool = False) -> int | None:
    """Tokens of the longest text that `model` takes; None where its configuration sets no limit.

    decoder: of an encoder-decoder, the text that it writes instead of the one that it reads.

    RoBERTa and its kin number positions from the one after `padding_idx`, as fairseq did, so that 514 positions with
    padding_idx 1 are a context of 512 tokens. Their tables of positions show it by having such a row.
    """
    side = text_side(model, decoder)
    config = side.config.get_text_config()
    sizes = (getattr(config, name, None) for name in (*(DECODER if decoder else ENCODER), *NAMES))
    size = next((size for size in sizes if isinstance(size, int) and size > 0), None)
    if size is None:
        return None
    tables = (module for name, module in side.named_modules() if "position" in name.rpartition(".")[2])
    padding = (row for table in tables if (row := _padding_row(table, size)) is not None)
    return size - max(padding, default=-1) - 1


def _padding_row(table: nn.Module, size: int) -> int | None:
    """The row of padding in a table of `size` positions; None of any other module."""
    weight = getattr(table, "weight", None)
    return getattr(table, "padding_idx", None) if weight is not None and len(weight) == size else None


def vocabulary_size(model: PreTrainedModel, decoder: bool = False) -> int:
    """Entries of the embedding of the text that `model` reads or, of an encoder-decoder, of the one that it writes."""
    side = text_side(model, decoder)
    try:
        return side.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):  # characters that are hashed (CANINE), or an embedding of its own
        return side.config.get_text_config().vocab_size


def text_side(model: PreTrainedModel, decoder: bool) -> PreTrainedModel:
    """The encoder or the decoder of an encoder-decoder; any other model as it is."""
    if not model.config.is_encoder_decoder:
        return model
    side = model.get_decoder() if decoder else model.get_encoder()
    return side if isinstance(side, PreTrainedModel) else model
