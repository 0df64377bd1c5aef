"""Workers killed under streams for a few seconds; `scripts/chaos_router.py` does it for minutes."""

import pytest

from scripts.chaos_router import chaos, make_parser
from tests.router.support import run


@pytest.mark.timeout(120)
def test_killed_workers_cost_no_stream_and_no_token():
    flags = ["--seconds", "8", "--streams", "60", "--every", "0.7", "--tpot", "0.01"]

    async def main():
        result = await chaos(make_parser().parse_args(flags))
        assert result["wrong"] == 0, result["examples"]
        assert result["requests"] > 100
        assert result["kills"] >= 5

    run(main, 90)
