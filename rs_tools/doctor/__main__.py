"""`python -m rs_tools.doctor`: the checks without the packages that `rs-tools` needs."""

from __future__ import annotations

import sys

from rs_tools.doctor import Setup, examine


def main() -> None:
    report = examine(Setup())
    print(report.to_json() if "--json" in sys.argv[1:] else report.to_text())
    sys.exit(report.status == "problem")


if __name__ == "__main__":
    main()
