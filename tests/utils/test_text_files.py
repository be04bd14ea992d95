import pytest

from atomdiff.utils.errors import UserError
from atomdiff.utils.text_files import parse_yaml, read_text, read_yaml

TEXT = "a photo of sks café\n猫, 😀\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_text_is_read_as_editors_save_it(tmp_path, encoding, ends):
    (tmp_path / "a.txt").write_bytes(TEXT.replace("\n", ends).encode(encoding))
    assert read_text(tmp_path / "a.txt") == TEXT


def test_big_endian_too(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xfe\xff" + TEXT.encode("utf-16-be"))
    assert read_text(tmp_path / "a.txt") == TEXT


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("café".encode("cp1252"), "not text in UTF-8 .byte 0xe9 at offset 3.*save it as UTF-8"),
        ("mug".encode("utf-16-le"), "not text in UTF-8 .it has null characters, like UTF-16 without a byte-order mark"),
        (b"\xff\xfea\0b", "not text in UTF-16"),
        (b"\x89PNG\r\n\x1a\n\0\0", "not text in UTF-8"),
    ],
)
def test_other_text_is_refused_by_name(tmp_path, content, reason):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=f"a.txt: {reason}"):
        read_text(tmp_path / "a.txt")


def test_what_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(UserError, match="none.txt: cannot be read .No such file"):
        read_text(tmp_path / "none.txt")
    with pytest.raises(UserError, match="cannot be read .Is a directory"):
        read_yaml(tmp_path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1e-4", {"a": 1e-4}),
        ("[1E4, .5, 5., -1.5e+3, 010, 1_000]", [1e4, 0.5, 5.0, -1500.0, 10, 1000]),
        ("[no, on, 1:30, 2001-01-01, none]", ["no", "on", "1:30", "2001-01-01", "none"]),
        ("[true, False, ~, null]", [True, False, None, None]),
        ("a: &x {b: 1}\nc:\n  <<: *x\n  b: 2", {"a": {"b": 1}, "c": {"b": 2}}),
        ('{\n\t"a": 1e-4,\n\t"b": "\\ud83d\\ude00"\n}', {"a": 1e-4, "b": "😀"}),
        ("", None),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_yaml_and_json_mean_what_people_mean(tmp_path, text, value, encoding):
    (tmp_path / "a.yaml").write_bytes(text.encode(encoding))
    assert read_yaml(tmp_path / "a.yaml") == value


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3", '{"a": 1, "a": 2}', "a: [", "!!python/object:os.system {}"])
def test_what_is_no_yaml_is_a_user_error_with_the_files_name(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match="a.yaml: cannot be read as YAML or JSON"):
        read_yaml(tmp_path / "a.yaml")
    with pytest.raises(UserError, match="^Advanced: cannot be read as YAML or JSON"):
        parse_yaml(text, "Advanced")
