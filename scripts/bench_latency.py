"""Latency predicted by a table, by MACs, by the cells' sum and by a Gaussian process, on held-out networks.

python scripts/bench_latency.py TABLE.lat.json [...]

All are fitted on the calibration networks of the table, and tested on its held-out ones. Make a table with
`archsearch profile --model resnet56 --runtime onnxruntime --device cpu --held-out 100 --out TABLE.lat.json`.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

from archsearch.latency.accuracy import assess, compare
from archsearch.latency.table import LatencyTable

CANDIDATES = 200_000


def gaussian_process(table: LatencyTable, widths: np.ndarray) -> np.ndarray:
    """Return what a Gaussian process over widths and MACs, as shares, predicts of the relative latency."""
    calibration, ms = table.networks("calibration")
    macs = table.macs(table.sizes[None])[0]

    def inputs(rows: np.ndarray) -> np.ndarray:
        return np.concatenate([rows / table.sizes, table.macs(rows)[:, None] / macs], axis=1)

    kernel = ConstantKernel() * Matern(length_scale=3.0, nu=2.5) + WhiteKernel(1e-3)
    model = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=3, random_state=0)
    return model.fit(inputs(calibration), ms).predict(inputs(widths))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tables", nargs="+", metavar="TABLE.lat.json")
    for path in parser.parse_args().tables:
        table = LatencyTable.read(path)
        content = table.content
        report = assess(table)
        widths, measured = table.networks("held-out", "equal-macs")
        tested = [record for record in content.networks if record.role in ("held-out", "equal-macs")]
        equal = np.array([record.role == "equal-macs" for record in tested])
        rows = {
            "latency table": report.table,
            **report.others,
            "Gaussian process": compare(gaussian_process(table, widths), measured, equal),
        }
        draw = np.random.default_rng(0)
        candidates = np.stack([draw.choice(group.widths, CANDIDATES) for group in content.groups], axis=1)
        began = time.process_time()
        table.predict(candidates)
        rate = CANDIDATES / (time.process_time() - began)
        conditions = content.conditions
        print(
            f"\n{conditions.model}, {conditions.runtime}, {content.fingerprint.get('accelerator')}, batch "
            f"{conditions.batch}, {conditions.threads} thread(s): {len(content.cells)} cells, "
            f"{len(table.networks('calibration')[0])} networks, {content.measuring_s:.0f} s of measuring and "
            f"{content.preparing_s:.0f} s of preparing; quantum {content.quantum}"
        )
        print(
            f"{rate:,.0f} candidates/s; reference {table.reference_ms:.3f} ms; noise {report.noise:.1%}; ",
            end="",
        )
        print(
            f"in 90 % intervals {report.coverage:.0%}, of predictions {report.coverage_in_use:.0%}; "
            f"spread at equal MACs {report.equal_spread:.1%}"
        )
        header = ("prediction", "MAPE %", "worst %", "<= 5 %", "<= 10 %", "Spearman", "Kendall", "equal MACs")
        print("{:<18}{:>9}{:>9}{:>9}{:>9}{:>10}{:>9}{:>12}".format(*header))
        for name, found in rows.items():
            print(
                f"{name:<18}{100 * found.mape:>9.1f}{100 * found.worst:>9.1f}{found.within_5:>9.2f}"
                f"{found.within_10:>9.2f}{found.spearman:>10.3f}{found.kendall:>9.3f}"
                f"{found.spearman_equal_macs:>12.3f}"
            )


if __name__ == "__main__":
    main()
