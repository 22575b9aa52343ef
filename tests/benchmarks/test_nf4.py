"""What benchmarks/nf4.py makes of its figures."""

from benchmarks import nf4


def test_its_table():
    def row(us: float) -> dict[str, object]:
        return {"us": us, "gb_per_s": 2560 / us, "ratio": us / 2, "same_bits": us < 4}

    one = {
        "matrix": "7B, o",
        "shape": [3584, 64],
        "ways": {"bitsandbytes": row(3.0), "kernel": row(2.5), "copy": row(2.0)},
    }
    off = {
        "matrix": "a toy",
        "shape": [1, 64],
        "ways": {"bitsandbytes": row(3.0), "kernel": row(5.0), "copy": row(2.0)},
    }
    made = nf4.printed({"matrices": [one, off], "host_us": {"bitsandbytes": 20.04, "kernel": 9.96}})
    head, *rest = made.splitlines()
    columns = ["bitsandbytes, us", "GB/s", "x floor", "kernel, us", "GB/s", "x floor"]
    assert head.strip("| ").split(" | ") == ["matrix", "rows x columns", "floor, us", *columns, "same bits"]
    assert rest == [
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| 7B, o | 3,584 x 64 | 2.0 | 3.0 | 853 | 1.50 | 2.5 | 1024 | 1.25 | yes |",
        "| a toy | 1 x 64 | 2.0 | 3.0 | 853 | 1.50 | 5.0 | 512 | 2.50 | no |",
        "",
        "The host's microseconds a call: bitsandbytes 20.0, kernel 10.0.",
    ]


def test_a_matrix_moves_its_bytes_once():
    matrices = nf4.make(2, 64, many=3)
    (data, state), out = matrices.packed[0], matrices.outs[0]
    assert len(matrices.outs) == len(matrices.source) == 3
    assert matrices.nbytes == data.nbytes + state.absmax.nbytes + 2 * out.numel() == 64 + 8 + 256
