"""Where documents come from, the errors on the way, and the split into train and held-out text."""

import sysconfig
from pathlib import Path

import pytest

from experiments.data.sources import Document, find_documents, split


def write(root, files):
    for name, data in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data if isinstance(data, bytes) else data.encode())
    return root


@pytest.mark.parametrize("path", [None, ""])
def test_default_is_the_python_library_without_tests_and_packages(path):
    documents = find_documents(path)
    names = [d.name for d in documents]
    assert names == sorted(names) and len(set(names)) == len(names) > 300
    assert {"os.py", "json/decoder.py"} <= set(names)
    assert all(n.endswith(".py") for n in names)
    parts = {part for n in names for part in n.split("/")[:-1]}
    assert not parts & {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    assert dict(documents)["os.py"] == Path(sysconfig.get_paths()["stdlib"], "os.py").read_text(encoding="utf-8")


def test_folder_gives_its_text_files_sorted_by_name(tmp_path):
    write(tmp_path, {"b.txt": "B\r\n", "a/z.md": "Z", "a/y/x": "\ufeffX", "tests/t.py": "T", "A.txt": "é"})
    expected = [("A.txt", "é"), ("a/y/x", "X"), ("a/z.md", "Z"), ("b.txt", "B\r\n"), ("tests/t.py", "T")]
    assert [tuple(d) for d in find_documents(str(tmp_path))] == expected
    assert find_documents(tmp_path) == find_documents(str(tmp_path) + "/")


def test_hidden_files_and_folders_are_left_out(tmp_path):
    write(tmp_path, {"a.txt": "A", ".hidden": "H", ".git/config": "G", "b/.cache/c": "C"})
    assert [d.name for d in find_documents(tmp_path)] == ["a.txt"]


def test_binary_and_empty_files_are_left_out_and_counted(tmp_path, capsys):
    write(tmp_path, {"a.txt": "A", "nul": b"text\0text", "latin": b"caf\xe9", "late": b"x" * 100_000 + b"\xff", "empty": "", "blank": "\n"})
    assert [d.name for d in find_documents(tmp_path)] == ["a.txt"]
    assert "3 binary and 2 empty" in capsys.readouterr().out


def test_file_is_one_document(tmp_path):
    write(tmp_path, {"a.txt": "one\ntwo\n"})
    assert find_documents(tmp_path / "a.txt") == [Document("a.txt", "one\ntwo\n")]


@pytest.mark.parametrize(
    "name, error, words",
    [
        ("nowhere", FileNotFoundError, "does not exist"),
        ("nowhere/deeper.txt", FileNotFoundError, "does not exist"),
        ("empty.txt", ValueError, "is empty"),
        ("blank.txt", ValueError, "is empty"),
        ("nul.dat", ValueError, "not UTF-8 text"),
        ("latin.txt", ValueError, "not UTF-8 text"),
        ("empty_folder", ValueError, "no text file"),
        ("binary_folder", ValueError, r"no text file \(1 binary, 1 empty\)"),
        ("hidden_folder", ValueError, "no text file"),
    ],
)
def test_bad_path_is_an_error_with_its_name_and_a_fix(tmp_path, name, error, words):
    write(tmp_path, {"empty.txt": "", "blank.txt": " \n", "nul.dat": b"a\0b", "latin.txt": b"caf\xe9", "hidden_folder/.a": "A"})
    write(tmp_path, {"binary_folder/a": b"\0", "binary_folder/b": ""})
    (tmp_path / "empty_folder").mkdir()
    with pytest.raises(error, match=f"data.path={tmp_path / name}[ :].*{words}.*;"):
        find_documents(str(tmp_path / name))


def test_device_is_refused():
    with pytest.raises(ValueError, match="data.path=/dev/null.*neither"):
        find_documents("/dev/null")


def test_split_is_a_partition_of_about_the_asked_size():
    documents = [Document(f"folder/{i}.txt", str(i)) for i in range(2000)]
    train, held = split(documents, 0.05)
    assert sorted(train + held) == sorted(documents)
    assert not set(train) & set(held)
    assert 60 <= len(held) <= 140
    assert [d.name for d in train] == [d.name for d in documents if d in set(train)]


def test_split_depends_on_names_alone():
    documents = [Document(f"{i}.txt", str(i)) for i in range(1000)]
    held = {d.name for d in split(documents)[1]}
    changed = [Document(d.name, "new") for d in reversed(documents)] + [Document("extra.txt", "")]
    assert {d.name for d in split(changed)[1]} - {"extra.txt"} == held
    first = [i for i in range(180) if f"{i}.txt" in held]
    assert first == [5, 12, 38, 149, 163, 176]  # crc32 / 2^32 < 0.05, on every machine


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("held_out", [0.001, 0.05, 0.999])
def test_few_documents_still_give_both_parts(count, held_out):
    train, held = split([Document(f"{i}", "x") for i in range(count)], held_out)
    assert train and held and len(train) + len(held) == count


def test_one_document_is_cut_by_lines_near_its_end():
    text = "".join(f"line {i}\n" for i in range(1000))
    (train,), (held,) = split([Document("a.txt", text)], 0.05)
    assert train.text + held.text == text
    assert train.text.endswith("\n") and held.text.startswith("line ")
    assert 0.045 < len(held.text) / len(text) < 0.055


@pytest.mark.parametrize("text, at", [("x\n" + "y" * 1000, 2), ("y" * 1000 + "\nx", 1001), ("a\nb", 2), ("a\nb\n", 2)])
def test_one_document_of_uneven_lines_is_cut_where_it_can_be(text, at):
    (train,), (held,) = split([Document("a.txt", text)])
    assert (train.text, held.text) == (text[:at], text[at:])


@pytest.mark.parametrize("text", ["one line", "one line\n", "one line\n\n\n", "\n\none line"])
def test_one_document_of_one_line_cannot_be_split(text):
    with pytest.raises(ValueError, match="data.path: a.txt cannot be cut"):
        split([Document("a.txt", text)])


def test_split_refuses_no_documents_and_shares_outside_0_to_1():
    with pytest.raises(ValueError, match="data.path"):
        split([])
    for share in (0, 1, -0.1):
        with pytest.raises(ValueError, match=f"held_out={share}"):
            split([Document("a", "a\nb")], share)
