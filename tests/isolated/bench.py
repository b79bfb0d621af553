"""The benchmark runs, its forms agree, and it writes what the table of docs/benchmarks.md is made of."""

import json

import pytest

from benchmarks import bench


def test_the_shipped_size(tmp_path):
    pytest.importorskip("openvino")
    out = tmp_path / "bench.json"
    bench.main(["--networks", "avatars-128", "--batches", "1", "--seconds", "0", "--out", str(out)])
    report = json.loads(out.read_text())
    assert [(row["batch"], row["precision"]) for row in report["rows"]] == [(1, "fp32"), (1, "bf16")]
    for row in report["rows"]:
        assert min(row[f"{form}_ms"] for form in bench.FORMS) > 0 and 0 < row["percent_of_peak"] < 150
        assert row["turns"] == 1 and row["gmacs"] > 0.1 and row["lpips_to_fp32"] < 0.01
    assert min(report["peak_gmacs_per_s"].values()) > 0 and report["device"]
    bench.write_table(report, tmp_path)
    assert (tmp_path / "bench-cpu.csv").read_text().startswith("network,batch,precision,plain_ms,eager_ms,openvino_ms")
