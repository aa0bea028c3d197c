"""The texts of a data set, for what comes before there are `Rows`: training a tokenizer."""

from collections.abc import Iterator
from typing import Any

from mmvae.data.columns import check_text
from mmvae.data.lines import BadRow
from mmvae.data.selection import place


def texts_of(rows: Any, column: str, name: str = "data", *, missing: bool = False, on_bad_row: str = "error") -> Iterator[str]:
    """The texts of a column, one by one.

    Arguments:
        rows: what `mmvae.data.load_rows` gives.
        column: the data set's column.
        name: what the data set is called in errors.
        missing: whether rows may lack the text; they are passed over.
        on_bad_row: "skip" passes over every row that holds no text.

    Returns:
        The texts in the order of the rows.

    Raises:
        BadRow: a row that holds no text.
    """
    rows = rows.select_columns([column])
    for number, row in enumerate(rows):
        if missing and row[column] is None:
            continue
        try:
            check_text(row[column])
        except ValueError as error:
            if on_bad_row == "skip":
                continue
            raise BadRow(f"{place(rows, name, number)}, field {column!r}: {error}") from error
        yield row[column]
