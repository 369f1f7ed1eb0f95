"""The public names, as a notebook uses them."""

import quantkit


def test_every_public_name_is_there():
    assert set(quantkit.__all__) == set(quantkit._HOME)
    assert all(getattr(quantkit, name) is not None for name in quantkit.__all__)


def test_the_main_job_in_five_lines(tmp_path, checkpoint):
    request = quantkit.PlanRequest(recipe="mxfp4-q8")
    report = quantkit.quantize(str(checkpoint), tmp_path / "out", request).report
    assert report == quantkit.read_report(tmp_path / "out")
    assert all(check.ok for check in quantkit.verify(tmp_path / "out", report))
