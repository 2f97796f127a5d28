"""A data file -> rows: a file each for the kinds of data files. A reader has

    rows     (file) -> Rows, in order
    header   (file) -> the columns that every row has; tables only

Strict readers of our own for text formats: the Arrow-backed loaders re-type good rows beside a bad one without a word, and count
lines from a block's start.
"""

from __future__ import annotations

from . import json_file, parquet, table, text

# by the end of the file's name; others are read as JSON
READERS = {
    ".json": json_file,
    ".jsonl": json_file,
    ".parquet": parquet,
    ".txt": text,
    **dict.fromkeys(table.SEPARATORS, table),
}


def reader_of(suffix):
    return READERS.get(suffix, json_file)
