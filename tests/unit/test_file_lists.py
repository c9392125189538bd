"""Thousands of files on a command line: listed where they are too many, and folders in their place."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dinoscope.errors import ConfigError
from dinoscope.file_lists import file_arguments, files_among

PRINT = """
import argparse
parser = argparse.ArgumentParser(fromfile_prefix_chars="@")
parser.add_argument("files", nargs="+")
print(len(parser.parse_args().files), parser.parse_args().files[-1])
"""


def test_few_files_stand_on_the_command_line_themselves(tmp_path: Path) -> None:
    files = [f"results/tiles/train/slide {number}.parquet" for number in range(500)]
    assert file_arguments(files, tmp_path) == files
    assert not list(tmp_path.iterdir())
    assert file_arguments([], tmp_path) == []


def test_many_files_are_listed_where_a_shell_would_refuse_them(tmp_path: Path) -> None:
    files = [f"results/tiles/train/it's é [{number}].parquet" for number in range(10_000)]
    command = [sys.executable, "-c", PRINT]
    with pytest.raises(OSError, match="Argument list too long"):
        subprocess.run(shlex.join([*command, *files]), shell=True, check=True)
    arguments = file_arguments(files, tmp_path / "lists")
    said = subprocess.run(shlex.join([*command, *arguments]), shell=True, check=True, capture_output=True, text=True)
    assert said.stdout == f"10000 {files[-1]}\n"


def test_a_list_is_named_by_its_content_and_a_dry_run_writes_none(tmp_path: Path) -> None:
    files = [f"{number:0100}" for number in range(1000)]
    (told,) = file_arguments(files, tmp_path, write=False)
    assert not list(tmp_path.iterdir())
    assert file_arguments(files, tmp_path) == [told] == file_arguments(files, tmp_path)
    assert Path(told[1:]).read_text(encoding="utf-8").splitlines() == files
    assert file_arguments(files[::-1], tmp_path) != [told]


def test_a_folder_stands_for_its_files(tmp_path: Path) -> None:
    for name in ("b.parquet", "a [1].parquet", ".c.123.partial.parquet", "a.json"):
        (tmp_path / name).touch()
    one = Path("elsewhere.parquet")
    assert files_among([one, tmp_path], ".parquet") == [one, tmp_path / "a [1].parquet", tmp_path / "b.parquet"]
    with pytest.raises(ConfigError, match=r"has no \.h5 files: give files, or a folder that has some"):
        files_among([tmp_path], ".h5")
