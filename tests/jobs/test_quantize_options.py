"""Options that would have no effect are refused before any work."""

import pytest

from quantkit.calibration.calibration_set import CalibrationSpec
from quantkit.errors import InputError
from quantkit.jobs.planning import PlanRequest
from quantkit.jobs.quantize_options import QuantizeOptions, check_request

TEXT = {"quantizer_text": CalibrationSpec("mine.txt")}


@pytest.mark.parametrize(
    ("request_options", "options", "message"),
    [
        ({"recipe": "uniform-4"}, TEXT, "`calibration`: nothing would read it"),
        ({"recipe": "uniform-4"}, {"quantizer_tokens": 512}, "rtn reads no text"),
        ({"budget": "9bpw", "quantizer": "rtn"}, {"quantizer_tokens": 512}, "rtn reads no text"),
        ({"budget": "9bpw", "quantizer": "rtn", "profile": "p"}, TEXT, "nothing would read it"),
        ({"recipe": "uniform-4"}, {"tuning_steps": 4}, "`tuning_steps` needs `quantizer`"),
    ],
)
def test_text_that_nothing_reads_is_refused(request_options, options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        check_request(tmp_path / "q", PlanRequest(**request_options), QuantizeOptions(**options))


@pytest.mark.parametrize(
    ("request_options", "options"),
    [
        ({"recipe": "uniform-4"}, {}),
        ({"recipe": "uniform-4", "quantizer": "gptq"}, {**TEXT, "quantizer_tokens": 512}),
        ({"budget": "9bpw", "quantizer": "rtn"}, TEXT),  # read by the profile
        ({"budget": "9bpw", "profile": "p"}, {**TEXT, "quantizer_tokens": 512}),
    ],
)
def test_text_that_something_reads_is_accepted(request_options, options, tmp_path):
    check_request(tmp_path / "q", PlanRequest(**request_options), QuantizeOptions(**options))


def test_a_plan_file_that_rounds_to_nearest_reads_no_text(cli, checkpoint, tmp_path):
    plan = tmp_path / "plan.json"
    assert cli("plan", checkpoint, "-r", "uniform-4", "-o", plan).exit_code == 0
    result = cli(
        "quantize", checkpoint, "--plan", plan, "-o", tmp_path / "q", "--calibration", "mine.txt"
    )
    assert result.exit_code == 2
    assert "--calibration: nothing would read it" in result.output
    assert not (tmp_path / "q").exists()
