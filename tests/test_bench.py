"""The benchmark runs, agrees with its reference, and writes what the table of docs/benchmarks.md is made of."""

import json

import pytest

from benchmarks import bench


@pytest.mark.parametrize("row", bench.ROWS)
def test_rows_of_the_shipped_networks(row, tmp_path, capsys):
    out = tmp_path / "bench.json"
    bench.main(["--device", "cpu", "--networks", "avatars-64", "--rows", row, "--batches", "2", "--precisions",
                "float32", "--seconds", "0", "--out", str(out)])  # fmt: skip
    report = json.loads(out.read_text())
    (result,) = report["rows"]
    assert result["row"] == row and result["turns"] == 5 and result["difference"] < 1e-4
    assert min(result["ms"].values()) > 0 and 0 < result["share_of_peak"] < 1.5 and result["gmacs"] > 0.1
    assert report["peak"]["float32_gmacs_per_s"] > 0 and report["device"]


def test_rows_that_would_take_too_long_are_left_out_and_named(tmp_path):
    out = tmp_path / "bench.json"
    bench.main(["--device", "cpu", "--networks", "avatars-64", "--rows", "encode", "--batches", "1", "2",
                "--precisions", "float32", "--seconds", "0", "--turns", "1", "--longest", "1e-6",
                "--out", str(out)])  # fmt: skip
    report = json.loads(out.read_text())
    assert [row["batch"] for row in report["rows"]] == [1]
    assert len(report["left_out"]) == 1 and report["left_out"][0].startswith("avatars-64 encode ×2 float32")
