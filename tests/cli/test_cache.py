"""`flexmerge cache`."""

from ..program import succeeds


def test_the_cache_is_shown_and_emptied(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert succeeds("cache", "--json").json == {"folder": str(tmp_path / "flexmerge"), "entries": 0, "bytes": 0}
    scores = tmp_path / "flexmerge" / "scores" / "ab"
    scores.mkdir(parents=True)
    (scores / "one.npz").write_bytes(b"12345")
    (tmp_path / "other").write_text("of another program")
    assert succeeds("cache").out == f"1 file, 5 B, in {tmp_path / 'flexmerge'}\n"
    (tmp_path / "flexmerge" / "uploads" / "cd").mkdir(parents=True)  # what a killed `merge -o s3://…` leaves
    (tmp_path / "flexmerge" / "uploads" / "cd" / "manifest.json").write_bytes(b"{}")
    assert succeeds("cache").out == f"2 files, 7 B, in {tmp_path / 'flexmerge'}\n"
    assert succeeds("cache", "-q").out == ""
    assert succeeds("cache", "--clear", "--json").json["entries"] == 2
    assert not (tmp_path / "flexmerge").exists() and (tmp_path / "other").exists()
    assert succeeds("cache", "--clear", "--json").json["entries"] == 0
