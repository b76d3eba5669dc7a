"""How prices, sizes and numbers of seeds are written on axes and in captions: table in, words out."""

import pandas as pd

from sparsity_utils.console import short_number


def price_name(checkpoints: pd.DataFrame) -> str:
    """`CETT-PPL-1%`."""
    return f"CETT-PPL-{checkpoints['p'].iloc[0]:g}%"


def shape_name(rows: pd.DataFrame) -> str:
    """`48x3`, of the first row."""
    first = rows.iloc[0]
    return f"{first['d_model']:g}x{first['n_layers']:g}"


def parameters_name(rows: pd.DataFrame) -> str:
    """`45k parameters`, or the mean where shapes differ a little."""
    return f"{short_number(rows.drop_duplicates(['d_model', 'n_layers'])['parameters'].mean())} parameters"


def seeds_name(rows: pd.DataFrame) -> str:
    """`2 seeds`, or `1 to 3 seeds` where shapes have unequally many."""
    counts = rows.groupby(["activation", "d_model", "n_layers"])["seed"].nunique()
    few, many = counts.min(), counts.max()
    return f"{few} to {many} seeds" if few < many else f"{many} seed{'s' if many > 1 else ''}"
