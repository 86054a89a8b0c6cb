"""The same lines for stock QEMU and for the example VMM.

same_lines.py lines FILE QEMU-SOCKET OUR-SOCKET: every line of the file, answers compared: errors by class and words,
results by their members and the kinds of these.
same_lines.py move QEMU-SOURCE QEMU-DESTINATION OUR-SOURCE OUR-DESTINATION: a migration with a pause in it, events and
members compared."""
import json
import socket
import sys
import time

PATIENCE = 90


class Talk:
    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(path)
        self.lines = self.socket.makefile("rb")
        self.events = []
        greeting = json.loads(self.lines.readline())
        assert set(greeting["QMP"]) == {"version", "capabilities"} and greeting["QMP"]["capabilities"] == ["oob"], greeting

    def hear(self):
        """The next line that is no event; an event is kept."""
        while True:
            line = self.lines.readline()
            assert line.endswith(b"\r\n"), line
            line = json.loads(line)
            if "event" not in line:
                return line
            self.keep(line)

    def keep(self, line):
        assert set(line["timestamp"]) == {"seconds", "microseconds"}, line
        self.events.append(" ".join([line["event"], *(str(value) for value in line.get("data", {}).values())]))

    def ask(self, line):
        self.socket.sendall(line.encode() + b"\n")
        return [self.hear() for _ in range(line.count("}{") + 1)]

    def run(self, command, **arguments):
        arguments = {name.replace("_", "-"): value for name, value in arguments.items()}
        answer = self.ask(json.dumps({"execute": command, "arguments": arguments}))[0]
        assert "return" in answer, (command, arguments, answer)
        return answer["return"]

    def until(self, event):
        while event not in self.events:
            line = json.loads(self.lines.readline())
            self.keep(line)
            assert self.events[-1] != "MIGRATION failed", (self.events, self.run("query-migrate"))

    def settled(self):
        """The run state that follows a migration's end, which QEMU tells a moment after the event."""
        deadline = time.monotonic() + PATIENCE
        while (status := self.run("query-status"))["status"] in ("finish-migrate", "inmigrate"):
            assert time.monotonic() < deadline, status
        return status


def form(value):
    """What of a result must be alike: members, and kinds of values."""
    if isinstance(value, dict):
        if "status" in value and "running" in value:
            return value
        return {name: form(member) for name, member in value.items()}
    if isinstance(value, list):
        return [form(value[0])] if value else []
    return type(value).__name__


def lines(path, qemu_path, our_path):
    qemu, ours = Talk(qemu_path), Talk(our_path)
    differ, count = [], 0
    with open(path) as file:
        for line in map(str.strip, file):
            count += 1
            for theirs, mine in zip(qemu.ask(line), ours.ask(line)):
                if "return" in theirs and "return" in mine:
                    theirs["return"], mine["return"] = form(theirs["return"]), form(mine["return"])
                if theirs != mine:
                    differ.append(f"{line}\n  QEMU: {json.dumps(theirs)}\n  vmig: {json.dumps(mine)}")
    assert qemu.events == ours.events, (qemu.events, ours.events)
    assert count > 70 and not differ, "\n".join(differ)


def move(source, destination):
    on = [{"capability": name, "state": True} for name in ("events", "return-path", "pause-before-switchover")]
    seen = []
    for side in (source, destination):
        side.run("qmp_capabilities")
        side.run("migrate-set-capabilities", capabilities=on)
    source.run("migrate-set-parameters", max_bandwidth=20 << 20, downtime_limit=250)
    destination.run("migrate-set-parameters", max_bandwidth=0)  # two vmigs keep to the lower limit
    destination.run("migrate-incoming", uri="tcp:127.0.0.1:0")
    waiting = destination.run("query-migrate")
    address = waiting["socket-address"][0]
    seen.append(("waiting", sorted(waiting), waiting["status"], {**address, "port": ""}))
    # What one side tells, the other understands.
    addr = {"transport": "socket", **address}
    source.run("migrate", channels=[{"channel-type": "main", "addr": addr}], detach=True)
    source.until("MIGRATION active")
    active = source.run("query-migrate")
    seen.append(("active", form({**active, "ram": {**active["ram"], "mbps": 0.0}}), source.run("query-status")))
    source.run("migrate-set-parameters", max_bandwidth=0)
    source.until("MIGRATION pre-switchover")
    paused = source.run("query-migrate")
    seen.append(("pre-switchover", sorted(paused), source.run("query-status")))
    source.run("migrate-continue", state="pre-switchover")
    source.until("MIGRATION completed")
    destination.until("MIGRATION completed")
    done = source.run("query-migrate")
    seen.append(("completed", sorted(done), sorted(done["ram"]), done["ram"]["page-size"], source.settled()))
    arrived = destination.run("query-migrate")
    seen.append(("arrived", arrived, destination.settled()))
    for side in (source, destination):
        seen.append([event for event in side.events if not event.startswith("MIGRATION_PASS")])
    assert source.events[:3] == ["MIGRATION setup", "MIGRATION_PASS 1", "MIGRATION active"], source.events
    return seen


what, *arguments = sys.argv[1:]
if what == "lines":
    lines(*arguments)
else:
    talks = [Talk(path) for path in arguments]
    theirs, mine = move(*talks[:2]), move(*talks[2:])
    for one, other in zip(theirs, mine, strict=True):
        assert one == other, f"\n  QEMU: {one}\n  vmig: {other}"
print("done")
