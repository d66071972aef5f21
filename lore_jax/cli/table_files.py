"""The files that a table of preferences may be: what Arrow and Python make of them.

A reader gives (names of all columns, {name: values} of those wanted), and refuses what
is broken with the file and the row, counted from 0 without the header and without empty
lines. Values are an Arrow column where all are texts, else a list.
"""

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

NEEDED = ("user", "chosen", "rejected")
OPTIONAL = ("prompt", "group", "label", "weight")
DELIMITERS = {".csv": ",;\t", ".tsv": "\t,;"}
UTF_8 = ("utf-8", "utf8", "utf-8-sig", "utf_8", "utf_8_sig")
BLOCKS = (1 << 22, (1 << 31) - 1)  # bytes that Arrow reads at a time; a row fits in one


def refuse_missing(path, called: Mapping, missing: list[str], found: list) -> None:
    """Raises `ValueError` where columns are missing, and lists those found."""
    if missing:
        named = [f"--{name}-column" for name in missing if name in (*NEEDED, *OPTIONAL)]
        hint = f". Other names are given with {', '.join(named)}" if named else ""
        raise ValueError(
            f"{path}: missing columns {[called[name] for name in missing]}; found "
            f"{found}{hint}"
        )


def _wanted(called: Mapping[str, str], header: list[str]) -> list[str]:
    """The columns of a file that a table may need, each once."""
    return [name for name in dict.fromkeys(called.values()) if name in header]


def _refuse_surrogates(path: Path, name: str, values: list) -> None:
    """Raises `ValueError` at the first text that is none; messages are seen later."""
    texts = ((n, value) for n, value in enumerate(values) if isinstance(value, str))
    for number, value in texts:
        if not value.isascii() and (place := lone_surrogate(value)) >= 0:
            raise ValueError(
                f"{path}, row {number}: {name} holds half a character, the lone "
                f"surrogate U+{ord(value[place]):X}, at place {place}: {value!r}"
            )


def to_utf_8(path: Path, data: bytes, encoding: str, *, records: bool) -> bytes:
    """A file's text as UTF-8 without a byte order mark.

    Raises:
      ValueError: naming the row that is not in this encoding.
    """
    mark = b"\xef\xbb\xbf"
    plain = encoding.lower() in UTF_8
    if plain and data.isascii():
        return data
    try:
        text = data.decode("utf-8" if plain else encoding)
    except LookupError as error:
        raise ValueError(f"{path}: {error}") from error
    except UnicodeDecodeError as error:
        before = data[: error.start].decode(encoding, "replace")
        row = _count_rows(before) if records else _count_lines(before)
        raise ValueError(
            f"{path}, row {row}: byte 0x{data[error.start]:02x} is not {encoding}; "
            "give the file's encoding with --encoding (latin-1, cp1252, utf-16, …)"
        ) from error
    if plain:
        return data.removeprefix(mark)
    return text.removeprefix("\ufeff").encode("utf-8", "surrogatepass")


def _count_lines(text: str) -> int:
    """The row of a JSONL file that begins or goes on after `text`."""
    lines = text.split("\n")
    return sum(1 for line in lines[:-1] if line.strip())


def _count_rows(text: str) -> int:
    """The row of a CSV file that begins or goes on after `text`; −1 is its header."""
    rows = [row for row in _csv_rows(text + "x") if row]
    return len(rows) - 2


def _csv_rows(text: str, delimiter: str = ",") -> list[list[str]]:
    """All rows by Python's own reader, which is slow, of cells of any length."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        return list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    finally:
        csv.field_size_limit(limit)


def read_csv(
    path: Path,
    data: bytes,
    called: Mapping[str, str],
    delimiters: str,
    needed: Sequence[str] = NEEDED,
):
    """(names of all columns, {name: values} of those wanted) of a delimited file."""
    import pyarrow
    import pyarrow.csv

    headers = {d: _csv_header(data, d) for d in delimiters}
    required = {called[name] for name in needed}
    fitting = [d for d in delimiters if required <= set(headers[d])]
    delimiter = fitting[0] if fitting else delimiters[0]
    header = headers[delimiter]
    if not header:
        raise ValueError(f"{path} holds no rows")
    _refuse_repeated(path, header)
    wanted = _wanted(called, header)
    missing = [name for name in needed if called[name] not in header]
    refuse_missing(path, called, missing, header)
    if b'"' in data:
        _check_quotes(path, data, delimiter)
    for size in BLOCKS:
        try:
            table = pyarrow.csv.read_csv(
                pyarrow.BufferReader(data),
                read_options=pyarrow.csv.ReadOptions(block_size=size),
                parse_options=pyarrow.csv.ParseOptions(
                    delimiter=delimiter, newlines_in_values=True
                ),
                convert_options=pyarrow.csv.ConvertOptions(
                    column_types=dict.fromkeys(wanted, pyarrow.string()),
                    include_columns=wanted,
                    strings_can_be_null=False,
                ),
            )
            break
        except pyarrow.ArrowInvalid as error:
            if "straddling" in str(error) and size != BLOCKS[-1]:
                continue
            _refuse_uneven(path, data, delimiter)
            raise ValueError(f"{path}: {error}") from error
    if not table.num_rows:
        raise ValueError(f"{path} holds no rows")
    return header, {name: table[name] for name in wanted}


def _csv_header(data: bytes, delimiter: str) -> list[str]:
    """The first row that is not empty."""
    size = 1 << 16
    while True:
        text = data[:size].decode("utf-8", "ignore")
        rows = [row for row in _csv_rows(text, delimiter) if row]
        if len(rows) > 1 or size >= len(data):
            return rows[0] if rows else []
        size *= 16


def _check_quotes(path: Path, data: bytes, delimiter: str) -> None:
    """Raises `ValueError` where a quoted cell does not end, or goes on after its end.

    Where quotes come in pairs, open after a delimiter and close before one, all is
    well; else Python's reader looks at every row.
    """
    codes, step = np.frombuffer(data, np.uint8), 1 << 18  # a step fits in a cache
    quotes = np.concatenate(
        [
            np.flatnonzero(codes[start : start + step] == ord('"')) + start
            for start in range(0, len(codes), step)
        ]
    )
    edge = np.zeros(256, bool)
    edge[list(f"{delimiter}\r\n".encode())] = True
    if quotes.size % 2 == 0:
        opening, closing = quotes[::2], quotes[1::2]
        again = np.append(closing[:-1] + 1 == opening[1:], False)  # a doubled quote
        before = (opening == 0) | edge[codes[opening - 1]]
        after = closing == len(codes) - 1
        after |= edge[codes[np.minimum(closing + 1, len(codes) - 1)]]
        doubled = np.append(False, again[:-1])
        if (before | doubled).all() and (after | again).all():
            return
    number, limit = -2, csv.field_size_limit(sys.maxsize)
    try:
        text = io.StringIO(data.decode(), newline="")
        for row in csv.reader(text, delimiter=delimiter, strict=True):
            number += bool(row)
    except csv.Error as error:
        raise ValueError(
            f"{path}, row {number + 1}: a quoted cell is broken: {error}"
        ) from error
    finally:
        csv.field_size_limit(limit)


def _refuse_uneven(path: Path, data: bytes, delimiter: str) -> None:
    """Raises `ValueError` at the first row with another number of cells."""
    header, *rows = [row for row in _csv_rows(data.decode(), delimiter) if row]
    for number, row in enumerate(rows):
        if len(row) != len(header):
            raise ValueError(
                f"{path}, row {number}: {len(row)} cells {row}, but there are "
                f"{len(header)} columns {header}; a cell with {delimiter!r} in it "
                "must be quoted"
            )


def _refuse_repeated(path: Path, header: list[str]) -> None:
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise ValueError(f"{path}: columns {repeated} stand twice in {header}")


def read_parquet(path: Path, data: bytes, called: Mapping[str, str]):
    """(names of all columns, {name: values} of those wanted) of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        header = list(file.schema_arrow.names)
        _refuse_repeated(path, header)
        wanted = _wanted(called, header)
        table = file.read(columns=wanted)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no whole Parquet file: {error}") from error
    if not file.metadata.num_rows:
        raise ValueError(f"{path} holds no rows")
    return header, {name: plain_column(table[name]) for name in wanted}


def plain_column(column) -> Any:
    """An Arrow column itself where all of it is text, else a list."""
    import pyarrow

    whole = column.type == pyarrow.string() and not column.null_count
    return column if whole else column.to_pylist()


def arrow(name: str, *arguments: Any) -> Any:
    """A function of Arrow over its columns and Python's values."""
    import pyarrow
    import pyarrow.compute

    kinds = (pyarrow.ChunkedArray, pyarrow.Array)
    given = [x if isinstance(x, kinds) else pyarrow.scalar(x) for x in arguments]
    return pyarrow.compute.call_function(name, given)


def first_true(column: Any) -> int:
    """The first row of an Arrow column of booleans that is true, or −1."""
    import pyarrow.compute

    return pyarrow.compute.index(column, True).as_py()


def coded(column: Any) -> tuple[list, np.ndarray]:
    """(the distinct texts of an Arrow column, the place of each row's among them)."""
    found = column.dictionary_encode().combine_chunks()
    return found.dictionary.to_pylist(), found.indices.to_numpy()


def as_list(column: Any) -> list:
    """The values of a column, a list or Arrow's; equal texts are one object."""
    if isinstance(column, list):
        return column
    distinct, place = coded(column)
    return np.array(distinct, object)[place].tolist()


def read_json(
    path: Path, text: bytes, called: Mapping[str, str], needed: Sequence[str] = NEEDED
):
    """(names of all columns, {name: values}) of one object a line, or of a list."""
    if text.lstrip()[:1] == b"[":
        try:
            rows = json.loads(text, object_pairs_hook=_distinct)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no list of objects: {error}") from error
    else:
        fast = _read_plain_json(text, called, needed)
        if fast is not None:
            return fast
        rows = []
        for line in text.decode("utf-8", "surrogatepass").split("\n"):
            if line and not line.isspace():
                rows.append(_json_object(line, f"{path}, row {len(rows)}"))
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}, row {number}: must be an object of columns, got {row!r:.60}"
            )
    if not rows:
        raise ValueError(f"{path} holds no rows")
    header = list(dict.fromkeys(name for row in rows for name in row))
    wanted = _wanted(called, header)
    columns = {name: [row.get(name) for row in rows] for name in wanted}
    for name, values in columns.items():
        _refuse_surrogates(path, name, values)
    return header, columns


def _read_plain_json(text: bytes, called: Mapping[str, str], needed: Sequence[str]):
    """`_read_json` by Arrow where every line is plain: texts, and numbers as labels.

    Arrow refuses whatever is anything else, a name that stands twice included; None
    then, so that Python's reader looks at every row. A file that begins with `null`
    would kill the process (pyarrow 26).
    """
    if text.lstrip()[:1] != b"{":
        return None
    try:
        import pyarrow
        import pyarrow.json
    except ImportError:
        return None
    numbers = ("label", "weight")
    kinds = {
        other: pyarrow.float64() if name in numbers else pyarrow.string()
        for name, other in called.items()
    }
    try:
        table = pyarrow.json.read_json(
            pyarrow.BufferReader(text),
            read_options=pyarrow.json.ReadOptions(block_size=BLOCKS[0]),
            parse_options=pyarrow.json.ParseOptions(
                explicit_schema=pyarrow.schema(list(kinds.items())),
                unexpected_field_behavior="ignore",
            ),
        )
    except pyarrow.ArrowException:
        return None
    filled = [n for n in table.column_names if table[n].null_count < table.num_rows]
    if not {called[name] for name in needed} <= set(filled):
        return None
    lines = sum(1 for line in text.split(b"\n") if line and not line.isspace())
    if lines != table.num_rows:
        return None
    return filled, {name: plain_column(table[name]) for name in filled}


def _json_object(line: str, where: str) -> Any:
    """One line of JSON, in which no name stands twice."""
    try:
        return json.loads(line, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}, in {line[:60]!r}") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"a name stands twice among {[name for name, _ in pairs]}")
    return row


def lone_surrogate(text: str) -> int:
    """Where half of a surrogate pair stands in a text, or −1."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return -1
