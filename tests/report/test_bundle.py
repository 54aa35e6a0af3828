"""What `merge` says when it is done, or would be."""

from ..program import succeeds


def test_merges_are_told_where_there_are_any(plan, tmp_path):
    merge = ("merge", plan, "-o", tmp_path / "b", "--force")
    assert " merges (" in succeeds(*merge, "--method", "average", "--size", "1x").out
    assert " merges (" in succeeds("inspect", tmp_path / "b").out
    for without in ((), ("--method", "auto", "--size", "1x")):
        last = succeeds(*merge, *without).out.splitlines()[-1]
        assert last.startswith("wrote ") and last.endswith(" files")
        assert " undone" not in succeeds("inspect", tmp_path / "b").out


def test_a_dry_run_has_no_column_of_what_is_not_measured(plan, tmp_path):
    merge = ("merge", plan, "-o", tmp_path / "b", "--method", "average")
    assert "distance" not in succeeds(*merge, "--dry-run").out
    assert "distance" in succeeds(*merge).out


def test_what_auto_chose_fits_a_terminal_of_80_columns(plan, tmp_path, monkeypatch):
    monkeypatch.setattr("flexmerge_cli.report.table.line_columns", lambda: 80)
    shown = succeeds("merge", plan, "--method", "auto", "--size", "1x", "-o", tmp_path / "b").out
    assert "centres" in shown and max(len(line.rstrip()) for line in shown.split("mean in")[0].splitlines()) <= 80
