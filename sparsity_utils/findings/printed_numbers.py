"""Printed numbers on training-free sparsity that other printed numbers, or shapes, do not bear out: notebook 10.

What follows from the shapes of published models is computed here. Of averages whose rows could not be retrieved again
the table says what a reading of the paper's text found, and computes nothing.
"""

from dataclasses import dataclass

import pandas as pd

WINA_V1, WINA_V2 = "WINA, arXiv 2505.19427v1", "WINA, arXiv 2505.19427v2"
WAS, LAROSA = "WAS, EMNLP 2025, Table 1", "LaRoSA, alibaba/EfficientAI 3d32ae4"


@dataclass(frozen=True)
class Shape:
    """The seven maps of a block, and the head, of a published decoder."""

    name: str
    d_model: int
    d_ff: int
    key_value: int  # width of k and of v
    layers: int
    vocabulary: int

    @property
    def attention(self) -> int:
        """Weights of q, k, v and o."""
        return 2 * self.d_model**2 + 2 * self.d_model * self.key_value

    @property
    def block(self) -> int:
        """Weights of the seven maps."""
        return self.attention + 3 * self.d_model * self.d_ff

    @property
    def head(self) -> int:
        """Weights of the output head."""
        return self.d_model * self.vocabulary

    @property
    def outputs(self) -> int:
        """Weights of o and down."""
        return self.d_model**2 + self.d_model * self.d_ff

    def saved(self, sparsity: float, rotations: int = 0) -> float:
        """Share of blocks and head that is not read, with so many d x d matrices read in each block beside it."""
        whole = self.layers * self.block + self.head
        read = self.layers * ((1 - sparsity) * self.block + rotations * self.d_model**2) + self.head
        return 1 - read / whole


LLAMA_2 = Shape("Llama-2-7B", 4096, 11008, 4096, 32, 32_000)
LLAMA_3 = Shape("Llama-3-8B", 4096, 14336, 1024, 32, 128_256)
SMOLLM2 = Shape("SmolLM2-135M", 576, 1536, 192, 30, 49_152)


def larosa_read(shape: Shape) -> float:
    """Share c of 1 - c p that LaRoSA's code reads at sparsity p: 0.8 p on q, k, v, gate and up, 1.2 p on o and down."""
    return (0.8 * (shape.block - shape.outputs) + 1.2 * shape.outputs) / shape.block


def computed() -> pd.DataFrame:
    """Numbers that follow from shapes, beside what was printed: source, quantity, printed, computed."""
    rows: list[tuple[str, str, str, str]] = [
        (
            f"{WINA_V1}, Table 5",
            "saved at 65% on Llama-2-7B, blocks and head",
            "63.7%, rotations left out",
            f"{LLAMA_2.saved(0.65):.1%}; with two d x d matrices per block {LLAMA_2.saved(0.65, 2):.1%}",
        )
    ]
    for shape in (LLAMA_2, LLAMA_3, SMOLLM2):
        share = larosa_read(shape)
        rows.append((LAROSA, f"read at sparsity p on {shape.name}", "1 - p", f"1 - {share:.2f} p (by its code)"))
    rotation = 2 * SMOLLM2.d_model**2 / SMOLLM2.block
    free = 1 - SMOLLM2.key_value / SMOLLM2.d_model
    charged, lossless = f"{rotation:.2%}: 50% becomes {0.5 - rotation:.0%}", f"{free:.1%}: W_k has 192 rows of 576"
    rows += [
        (WINA_V2, "rotations, of a block of SmolLM2", "not counted", charged),
        (WINA_V2, "lossless sparsity of rotated k on SmolLM2", "not said", lossless),
        ("all", "saved at 50% of SmolLM2's blocks, head included", "50%", f"{SMOLLM2.saved(0.5):.1%}"),
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["source", "quantity", "printed", "computed"])


def read_only() -> pd.DataFrame:
    """What a reading of the papers found; the rows behind these averages could not be retrieved again."""
    rows = [
        (WINA_V1, "averages that follow from their rows", "52", "39"),
        (WINA_V1, "largest gain over TEAL, points", "2.94", "2.61"),
        (WINA_V1, "gain over rotated TEAL, Llama-2-7B, 65%, points", "2.09 in Table 8 of v2", "-0.02"),
        (WINA_V2, "R-Sparse on Mistral-7B at 65%: Table 5, and the text", "57.40", "59.91"),
        (WAS, "dense perplexity of Mistral-7B on two corpora", "3.12 and 3.12", "one of the two is evidently wrong"),
    ]
    return pd.DataFrame(rows, columns=["source", "quantity", "printed", "found"])
