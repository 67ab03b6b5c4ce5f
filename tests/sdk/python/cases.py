"""What the checks of this folder share: a list of cases, and a run that prints one line per case, then "N passed, M failed"."""

import traceback

CASES = []


def case(function):
    CASES.append(function)
    return function


def equal(found, wanted):
    assert found == wanted, f"{found!r} is not {wanted!r}"


def run(name):
    """Runs every case and gives the exit code."""
    failed = 0
    for function in CASES:
        try:
            function()
            print(f"ok    {name} {function.__name__}", flush=True)
        except Exception as error:
            failed += 1
            print(f"FAILED {name} {function.__name__}: {type(error).__name__}: {error}", flush=True)
            if not isinstance(error, AssertionError):
                traceback.print_exc()
    print(f"{len(CASES) - failed} passed, {failed} failed", flush=True)
    return 1 if failed else 0
