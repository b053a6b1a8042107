"""The slots' services alone, supervised in the foreground: for a container, beside others with Envoy and Airflow.

All of them share one loopback interface and the folders of the local target, so that whoever moves releases, in
whichever container, does it as on a bare machine.
"""

from __future__ import annotations

import signal
import subprocess
import time
from types import FrameType

from pipelines.errors import PerchError, Refusal
from pipelines.release.local_layout import LocalPorts, SlotPorts
from pipelines.services.programs import home_environment, slot_programs, tool
from pipelines.services.stack import Stack, render_config
from pipelines.settings import Settings

# Fixed, for nobody else listens at that loopback interface, and Prometheus' configuration names them.
PORTS = LocalPorts(
    clients=3000,
    admin=9901,
    slots={
        "serving-a": SlotPorts(api=3001, metrics=9001),
        "serving-b": SlotPorts(api=3002, metrics=9002),
        "serving-staging": SlotPorts(api=3003, metrics=9003),
    },
    clients_host="0.0.0.0",  # noqa: S104 - what is published of the container is the installation's business
)
_START_LIMIT_S = 30.0


def run_slots(settings: Settings, ports: LocalPorts = PORTS) -> int:
    """Lay out Envoy's configuration, start what the slots hold, and stay until told to end.

    Args:
        settings: whose home holds the plan.
        ports: to listen at.

    Returns:
        Exit status of the supervisor.

    Raises:
        Refusal: another supervisor has this home; what the plan of its services says stays as it is.
        PerchError: the supervisor ended at once, or does not answer, or the services could not be started.
    """
    stack = Stack(settings)
    if stack.is_answering():
        raise Refusal(
            f"the services of {settings.home}",
            "run already",
            limit="one supervisor in a home",
            way_out="`perch down` ends them; or name another folder by PERCH_HOME",
        )
    stack.working_folder.mkdir(parents=True, exist_ok=True)
    stack.target.lay_out(ports)
    config = stack.folder / "supervisord.conf"
    config.touch(mode=0o600)
    config.write_text(render_config(stack, slot_programs(settings, home_environment(settings))), encoding="utf-8")
    with subprocess.Popen(
        [tool("supervisord"), "--nodaemon", "--configuration", str(config)], cwd=stack.folder
    ) as supervisor:

        def pass_on(number: int, _: FrameType | None) -> None:
            supervisor.send_signal(number)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, pass_on)
        try:
            deadline = time.monotonic() + _START_LIMIT_S
            while not stack.is_answering():
                if supervisor.poll() is not None or time.monotonic() > deadline:
                    supervisor.kill()
                    raise PerchError(
                        f"supervisord does not answer\n  what to do: look at {stack.folder}/supervisord.log"
                    )
                time.sleep(0.02)
            stack.target.resume()
        except BaseException:
            supervisor.terminate()  # its end is waited for, and without services it would never come
            raise
        return supervisor.wait()
