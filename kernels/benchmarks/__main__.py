"""Runs the benchmarks from the command line: prints Markdown or JSON, errors as one line."""

import json
import sys
from pathlib import Path

from benchmarks.options import Options, parse
from benchmarks.result import RESULT, SCHEMA, TABLE, Benchmarks
from hysparse_cli.errors import HysparseError, QualityGateFailed
from hysparse_cli.progress import stages


def main() -> int:
    """Measure what the command line asks for.

    Returns: the exit code, as the ``hysparse`` command has it; 6 where a kernel is wrong.
    """
    options, output, as_json = parse(sys.argv[1:])
    try:
        result = _measure(options, output)
        print(json.dumps(result.as_json(), indent=1) if as_json else result.markdown())
        if failures := result.failures():
            raise QualityGateFailed("; ".join(failures))
    except HysparseError as error:
        print(f"bench-kernels: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("bench-kernels: interrupted", file=sys.stderr)
        return 130
    return 0


def _measure(options: Options, output: Path | None) -> Benchmarks:
    from benchmarks.run import bench_kernels
    from hysparse_cli.files.results import prepare_results

    if output is not None:
        prepare_results(output, RESULT, SCHEMA.partition("/")[0], [TABLE])

    def keep(so_far: Benchmarks) -> None:
        if output is not None:
            so_far.write(output)

    with stages() as advance:
        return bench_kernels(options, advance, keep)


if __name__ == "__main__":
    sys.exit(main())
