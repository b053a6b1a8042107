import io

from rich.console import Console

from pipelines.data.progress import ImageProgress


def test_image_progress__in_a_log__ends_with_one_line_with_a_rate():
    stream = io.StringIO()
    with ImageProgress("reading", 1200, Console(file=stream)) as progress:
        for _ in range(12):
            progress.advance(100)
    line = stream.getvalue()
    assert line.count("\n") == 1
    assert line.startswith("  reading 1,200 of 1,200 images · ")
    assert line.rstrip().endswith("images/s")


def test_image_progress__on_a_terminal__shows_bar_count_and_rate():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100)
    with ImageProgress("reading", 10, console) as progress:
        progress.advance(10)
    assert "10/10" in stream.getvalue()
    assert "images/s" in stream.getvalue()
