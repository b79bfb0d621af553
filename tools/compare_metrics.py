"""Compare two files of metrics: the same rows and protocol, and every number within a tolerance.

python tools/compare_metrics.py EXPECTED FRESH --tolerance 5e-4     EXPECTED may be "-" (standard input)
"""

import argparse
import json
import math
import sys
from pathlib import Path


def flatten(value: object, name: str = "") -> dict[str, object]:
    """Nested JSON as {"rows[padinv].mse": 0.01, …}; rows are named by their method, so that order does not matter."""
    if isinstance(value, dict):
        items = [(f"{name}.{key}".lstrip("."), item) for key, item in value.items()]
    elif isinstance(value, list):
        keys = [item.get("method", i) if isinstance(item, dict) else i for i, item in enumerate(value)]
        if len(set(keys)) != len(keys):
            raise ValueError(f"{name}: methods occur twice: {keys}")
        items = [(f"{name}[{key}]", item) for key, item in zip(keys, value, strict=True)]
    else:
        return {name: value}
    return {key: leaf for child, item in items for key, leaf in flatten(item, child).items()} or {name: value}


def differences(expected: object, fresh: object, tolerance: float) -> list[str]:
    """One line for each entry that is missing, new or further off than the tolerance (absolute)."""
    a, b, found = flatten(expected), flatten(fresh), []
    for key in [*a, *(key for key in b if key not in a)]:
        if key not in b:
            found.append(f"{key}: expected {a[key]!r}, missing")
        elif key not in a:
            found.append(f"{key}: {b[key]!r} is new")
        elif isinstance(a[key], float | int) and isinstance(b[key], float | int):
            if not math.isclose(a[key], b[key], rel_tol=0, abs_tol=tolerance):
                found.append(f"{key}: expected {a[key]}, got {b[key]} (off by {abs(a[key] - b[key]):.2g})")
        elif a[key] != b[key]:
            found.append(f"{key}: expected {a[key]!r}, got {b[key]!r}")
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("expected", help='JSON file, or "-" for standard input')
    parser.add_argument("fresh", help="JSON file")
    parser.add_argument("--tolerance", type=float, default=5e-4, help="largest absolute difference (%(default)s)")
    args = parser.parse_args(arguments)
    texts = [sys.stdin.read() if path == "-" else Path(path).read_text() for path in (args.expected, args.fresh)]
    try:
        expected, fresh = (json.loads(text) for text in texts)
        found = differences(expected, fresh, args.tolerance)
    except ValueError as error:
        sys.exit(f"Not comparable: {error}")
    # Another device or version is worth a word; another checkpoint or number of images is another measurement.
    notes = [line for line in found if line.startswith(("protocol.device:", "protocol.packages"))]
    found = [line for line in found if line not in notes]
    print("".join(f"Note: {line}\n" for line in notes), end="")
    if found:
        sys.exit("\n".join([f"{args.fresh} differs from what was expected:", *(f"  {line}" for line in found)]))
    numbers = sum(isinstance(value, float) for value in flatten(fresh).values())
    print(f"{args.fresh} equals the expected one: {numbers} numbers within {args.tolerance:g}.")


if __name__ == "__main__":
    main()
