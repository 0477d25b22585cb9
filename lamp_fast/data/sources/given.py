"""Pictures as a command line names them: files, folders and tables of paths, without labels."""

import csv
from pathlib import Path

from lamp_fast.data.pictures import EXTENSIONS
from lamp_fast.data.sources.files import LeftOut, check_regular, pictures_below
from lamp_fast.errors import InputError

TABLE_SUFFIX = ".csv"


def list_pictures(source: Path, path_column: str, left_out: LeftOut) -> list[Path]:
    """The picture files that an argument means, in order; no picture is read yet.

    A folder is listed as training lists the folder of a class; what is in it and is not taken is
    counted in ``left_out``.

    Args:
        source: a picture, a folder of them at any depth, or a .csv file.
        path_column: of .csv files, whose paths start from the file's own folder.
        left_out: counts.

    Raises:
        InputError: no such file or folder, a folder without pictures, a malformed .csv file.
    """
    if source.is_dir():
        found = pictures_below(source, left_out)
        if not found:
            beside = "; ".join(left_out.lines())
            raise InputError(
                f"{source}: holds no pictures ({', '.join(EXTENSIONS)}){beside and '; ' + beside}"
            )
        return sorted(source / each for each in found)
    if not source.exists():
        raise InputError(f"{source}: does not exist, expected a picture, a folder or a .csv file")
    if source.suffix.lower() == TABLE_SUFFIX:
        return _listed(source, path_column)
    return [source]


def _listed(file: Path, column: str) -> list[Path]:
    try:
        check_regular(file)
        # The signature that spreadsheets write before UTF-8 is no part of the first column's name.
        with open(file, encoding="utf-8-sig", newline="") as stream:
            rows = csv.DictReader(stream, skipinitialspace=True, strict=True)
            if column not in (rows.fieldnames or ()):
                has = ", ".join(map(repr, (rows.fieldnames or ())[:12])) or "none"
                raise InputError(
                    f"--path-column {column}: expected such a column in {file}; it has {has}"
                )
            paths = [row[column] for row in rows]
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not a UTF-8 .csv file ({error})") from None
    for number, path in enumerate(paths, start=1):
        if not path or "\0" in path:
            raise InputError(f"{file}: row {number} has no path")
    if not paths:
        raise InputError(f"{file}: has no rows, expected a row a picture")
    return [file.parent / path for path in paths]
