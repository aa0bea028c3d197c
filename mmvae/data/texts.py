"""The texts of a data set, for what comes before there are `Rows`: training a tokenizer."""

from collections.abc import Iterator, Sequence
from typing import Any

from mmvae.data.columns import check_text
from mmvae.data.lines import BadRow
from mmvae.data.places import place


def texts_of(
    rows: Any, column: str, name: str = "data", *, missing: bool = False, on_bad_row: str = "error", reserved: Sequence[str] = ()
) -> Iterator[str]:
    """The texts of a column, one by one.

    Arguments:
        rows: what `mmvae.data.load_rows` gives.
        column: the data set's column.
        name: what the data set is called in errors.
        missing: whether rows may lack the text; they are passed over.
        on_bad_row: "skip_empty" passes over rows that lack the text, too, and "skip" over every bad one.
        reserved: words that no text may hold, those of the tokenizer that the texts are to train.

    Returns:
        The texts in the order of the rows.

    Raises:
        BadRow: a row that holds no text, or a reserved word.
    """
    rows = rows.select_columns([column])
    for number, row in enumerate(rows):
        if row[column] is None and (missing or on_bad_row == "skip_empty"):
            continue
        try:
            check_text(row[column])
            if found := [word for word in reserved if word in row[column]]:
                raise ValueError(f"got text with the reserved word {found[0]!r}, expected text without it")
        except ValueError as error:
            if on_bad_row == "skip":
                continue
            raise BadRow(f"{place(rows, name, number)}, field {column!r}: {error}") from error
        yield row[column]
