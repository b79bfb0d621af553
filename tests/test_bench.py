"""The benchmark runs, agrees with its reference, and writes what README's table is made of."""

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
