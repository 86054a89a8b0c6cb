"""The real client, PyPI's qemu.qmp, drives a source and a destination: drive.py SCENARIO SOURCE-SOCKET DESTINATION-SOCKET.

Prints "done" as its last line. What the guest makes of it is looked at by the test that starts this."""
import asyncio
import os
import socket
import sys
import tempfile

from qemu.qmp import ExecuteError, QMPClient

PATIENCE = 90
RAM = {"transferred", "remaining", "total", "duplicate", "normal", "normal-bytes", "dirty-pages-rate", "mbps",
       "dirty-sync-count", "postcopy-requests", "page-size", "multifd-bytes", "pages-per-second", "precopy-bytes",
       "downtime-bytes", "postcopy-bytes", "dirty-sync-missed-zero-copy"}


class Side:
    """One VMM and everything it told us."""

    def __init__(self, name):
        self.qmp = QMPClient(name)
        self.told = []

    async def connect(self, path):
        await self.qmp.connect(path)

    async def run(self, command, arguments=None, oob=False):
        return await asyncio.wait_for(self.qmp.execute(command, arguments or {}, oob), PATIENCE)

    async def refused(self, command, arguments=None, oob=False):
        try:
            found = await self.run(command, arguments, oob)
        except ExecuteError as error:
            return str(error)
        raise AssertionError(f"{command} {arguments} was not refused but returned {found}")

    async def until(self, what):
        """Waits for an event, such as "MIGRATION completed" or "STOP"."""
        while True:
            if self.qmp.events.empty() and what in self.told:
                return
            event = await asyncio.wait_for(self.qmp.events.get(), PATIENCE)
            data = event.get("data", {})
            value = data.get("status", data.get("pass"))
            self.told.append(event["event"] + ("" if value is None else f" {value}"))
            if self.told[-1] == what:
                return
            assert self.told[-1] != "MIGRATION failed", (self.told, await self.run("query-migrate"))

    async def status(self):
        found = await self.run("query-status")
        assert found["running"] == (found["status"] == "running"), found
        return found["status"]

    def passes_in_order(self):
        """The events without the passes, which count up from 1."""
        passes = [int(told.split()[1]) for told in self.told if told.startswith("MIGRATION_PASS")]
        assert passes == list(range(1, len(passes) + 1)), self.told
        return [told for told in self.told if not told.startswith("MIGRATION_PASS")]


async def listen(destination):
    """Where it listens, as a URI."""
    address = (await destination.run("query-migrate"))["socket-address"][0]
    return f"tcp:{address['host']}:{address['port']}"


async def slow(source):
    await source.run("migrate-set-parameters", {"max-bandwidth": 1 << 20})


async def scenario_migrate(source, destination):
    assert await source.run("query-migrate") == {}
    assert (await source.status(), await destination.status()) == ("running", "inmigrate")
    await slow(source)
    await source.run("migrate", {"uri": await listen(destination)})
    await source.until("MIGRATION active")
    active = await source.run("query-migrate")
    assert set(active) == {"status", "setup-time", "total-time", "expected-downtime", "ram"}, active
    assert set(active["ram"]) == RAM, active["ram"]
    threads = await source.run("query-migrationthreads")
    assert any(thread["name"] == "live_migration" for thread in threads), threads
    assert not any(thread["name"].startswith("qmp") for thread in threads), threads
    await source.run("migrate-set-parameters", {"max-bandwidth": 0})
    await source.until("MIGRATION completed")
    await destination.until("MIGRATION completed")
    told = source.passes_in_order()
    assert told == ["MIGRATION setup", "MIGRATION active", "STOP", "MIGRATION device", "MIGRATION completed"], told
    assert source.told[:3] == ["MIGRATION setup", "MIGRATION_PASS 1", "MIGRATION active"], source.told
    assert destination.told[-2:] == ["RESUME", "MIGRATION completed"], destination.told
    done = await source.run("query-migrate")
    assert set(done) == {"status", "setup-time", "total-time", "downtime", "ram"}, done
    ram = done["ram"]
    assert (ram["remaining"], ram["dirty-pages-rate"], ram["page-size"]) == (0, 0, 4096), ram
    assert ram["precopy-bytes"] + ram["downtime-bytes"] == ram["transferred"] >= ram["normal-bytes"], ram
    assert ram["multifd-bytes"] > ram["transferred"] / 2 and ram["precopy-bytes"] > ram["downtime-bytes"] > 0, ram
    assert ram["dirty-sync-count"] == sum(told.startswith("MIGRATION_PASS") for told in source.told), (ram, source.told)
    assert await destination.run("query-migrate") == {"status": "completed"}
    assert (await source.status(), await destination.status()) == ("postmigrate", "running")
    assert "was migrated" in await source.refused("cont")
    words = await source.refused("migrate", {"uri": "tcp:127.0.0.1:1"})
    assert words == "Can't migrate the vm that was paused due to previous migration", words


async def scenario_cancel(source, destination):
    await slow(source)
    uri = await listen(destination)
    await source.run("migrate", {"uri": uri})
    await source.until("MIGRATION active")
    words = await source.refused("migrate", {"uri": uri})
    assert words == "There's a migration process in progress", words
    assert await source.run("migrate_cancel") == {}
    await source.until("MIGRATION cancelled")
    assert source.told[-2:] == ["MIGRATION cancelling", "MIGRATION cancelled"], source.told
    assert await source.run("query-migrate") == {"status": "cancelled"}
    assert await source.status() == "running"
    assert await source.run("migrate_cancel") == {}, "nothing runs, and that is fine"
    # The destination gave up too, and is asked again.
    await destination.until("MIGRATION failed")
    assert "error-desc" in await destination.run("query-migrate")
    await destination.run("migrate-incoming", {"uri": "tcp:127.0.0.1:0", "exit-on-error": False})
    words = await destination.refused("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})
    assert words == "The incoming migration has already been started", words
    words = await destination.refused("migrate", {"uri": "tcp:127.0.0.1:1"})
    assert words == "Guest is waiting for an incoming migration", words
    await source.run("migrate-set-parameters", {"max-bandwidth": 0})
    host, port = (await listen(destination))[4:].rsplit(":", 1)
    address = {"transport": "socket", "type": "inet", "host": host, "port": port}
    await source.run("migrate", {"channels": [{"channel-type": "main", "addr": address}]})
    await source.until("MIGRATION completed")
    await destination.until("MIGRATION completed")


async def scenario_pause(source, destination):
    pause = {"capability": "pause-before-switchover", "state": True}
    await source.run("migrate-set-capabilities", {"capabilities": [pause]})
    assert pause in await source.run("query-migrate-capabilities")
    words = await source.refused("migrate-continue", {"state": "pre-switchover"})
    assert words == "Migration not in expected state: none", words
    await source.run("migrate", {"uri": await listen(destination)})
    await source.until("MIGRATION pre-switchover")
    assert await source.status() == "finish-migrate"
    assert (await source.run("query-migrate"))["status"] == "pre-switchover"
    words = await source.refused("migrate-continue", {"state": "device"})
    assert words == "Migration not in expected state: pre-switchover", words
    await source.run("migrate-continue", {"state": "pre-switchover"})
    await source.until("MIGRATION completed")
    told = source.passes_in_order()
    assert told == ["MIGRATION setup", "MIGRATION active", "STOP", "MIGRATION pre-switchover", "MIGRATION device",
                    "MIGRATION completed"], told
    await destination.until("MIGRATION completed")


async def scenario_pause_and_cancel(source, destination):
    pause = {"capability": "pause-before-switchover", "state": True}
    await source.run("migrate-set-capabilities", {"capabilities": [pause]})
    await source.run("migrate", {"uri": await listen(destination)})
    await source.until("MIGRATION pre-switchover")
    await source.run("migrate_cancel")
    await source.until("MIGRATION cancelled")
    told = source.passes_in_order()
    assert told[-4:] == ["MIGRATION pre-switchover", "MIGRATION cancelling", "RESUME", "MIGRATION cancelled"], told
    assert await source.status() == "running"


async def scenario_parameters(source, destination):
    await slow(source)
    await source.run("migrate", {"uri": await listen(destination)})
    await source.until("MIGRATION active")
    words = await source.refused("migrate-set-parameters", {"downtime-limit": 5, "stall-timeout": 100})
    assert "'stall-timeout' cannot change while a migration runs" in words, words
    assert (await source.run("query-migrate-parameters"))["downtime-limit"] == 300, "all or nothing"
    events = {"capabilities": [{"capability": "events", "state": False}]}
    assert await source.refused("migrate-set-capabilities", events) == "There's a migration process in progress"
    for limit in (2 << 20, 3 << 20, 0):
        await source.run("migrate-set-parameters", {"max-bandwidth": limit, "downtime-limit": 1000})
        found = await source.run("query-migrate-parameters")
        assert (found["max-bandwidth"], found["downtime-limit"]) == (limit, 1000), found
        assert (await source.run("query-migrate"))["status"] in ("active", "device", "completed")
        await asyncio.sleep(0.2)
    await source.until("MIGRATION completed")
    await destination.until("MIGRATION completed")


async def scenario_descriptors(source, destination):
    """Both ends of a socket pair are handed over, and the guest moves through it. Out of band, too."""
    assert await destination.run("migrate_cancel") == {}
    while (await destination.run("query-migrate"))["status"] != "cancelled":
        await asyncio.sleep(0.01)
    ours, theirs = socket.socketpair()
    words = await source.refused("getfd", {"fdname": "link"})
    assert words == "No file descriptor supplied via SCM_RIGHTS", words
    for side, end in ((source, ours), (destination, theirs)):
        side.qmp.send_fd_scm(end.fileno())
        await side.run("getfd", {"fdname": "link"})
        end.close()
    with open(os.devnull, "rb") as null:
        source.qmp.send_fd_scm(null.fileno())
        added = await source.run("add-fd", {"opaque": "null"})
    assert await source.run("query-fdsets") == [{"fdset-id": 0, "fds": [{"fd": added["fd"], "opaque": "null"}]}]
    await source.run("remove-fd", {"fdset-id": 0})
    assert await source.run("query-fdsets") == []
    words = await source.refused("migrate", {"uri": "fd:chain"})
    assert words == "File descriptor named 'chain' has not been found", words
    words = await source.refused("migrate-pause", oob=True)
    assert words.startswith("migrate-pause is currently only supported"), words
    words = await source.refused("query-status", oob=True)
    assert words == "The command query-status does not support OOB", words
    await destination.run("migrate-incoming", {"uri": "fd:link"})
    await source.run("migrate", {"uri": "fd:link"})
    await source.until("MIGRATION completed")
    await destination.until("MIGRATION completed")
    assert await source.refused("closefd", {"fdname": "link"}) == "File descriptor named 'link' not found", "used up"


async def scenario_set_of_descriptors(source, destination):
    """The guest is saved to a file of an fd set behind a header, and comes back from there."""
    await destination.run("migrate_cancel")
    while (await destination.run("query-migrate"))["status"] != "cancelled":
        await asyncio.sleep(0.01)
    with tempfile.TemporaryFile() as file:
        file.write(b"h" * 4096)
        file.flush()
        reading = open(f"/proc/self/fd/{file.fileno()}", "rb")
        # Refused at once, or a moment later.
        try:
            await source.run("migrate", {"uri": "file:/dev/fdset/7"})
        except ExecuteError as error:
            assert "there is no fd set 7" in str(error), error
        await source.until("MIGRATION failed")
        assert "there is no fd set 7" in (await source.run("query-migrate"))["error-desc"]
        for side, end in ((source, reading), (source, file), (destination, reading)):
            side.qmp.send_fd_scm(end.fileno())
            assert (await side.run("add-fd", {"fdset-id": 7}))["fdset-id"] == 7
        reading.close()
        addr = {"transport": "file", "filename": "/dev/fdset/7", "offset": 4096}
        await source.run("migrate", {"channels": [{"channel-type": "main", "addr": addr}]})
        await source.until("MIGRATION completed")
        file.seek(0)
        assert file.read(4096) == b"h" * 4096
        await destination.run("migrate-incoming", {"uri": "file:/dev/fdset/7,offset=4096"})
        await destination.until("MIGRATION completed")
        assert await destination.status() == "running"


async def scenario_commands(source, destination):
    """Through a program and its arguments, which a shell must not touch."""
    await destination.run("migrate_cancel")
    while (await destination.run("query-migrate"))["status"] != "cancelled":
        await asyncio.sleep(0.01)
    with tempfile.TemporaryDirectory() as place:
        path = f"{place}/it's $HOME"
        addr = {"transport": "exec", "args": ["dd", f"of={path}", "status=none"]}
        await source.run("migrate", {"channels": [{"channel-type": "main", "addr": addr}]})
        await source.until("MIGRATION completed")
        addr = {"transport": "exec", "args": ["cat", path]}
        await destination.run("migrate-incoming", {"channels": [{"channel-type": "main", "addr": addr}]})
        await destination.until("MIGRATION completed")
        assert await destination.status() == "running"


async def main(scenario, source_path, destination_path):
    source, destination = Side("source"), Side("destination")
    await source.connect(source_path)
    await destination.connect(destination_path)
    await globals()[f"scenario_{scenario}"](source, destination)
    for side in (source, destination):
        assert (await side.run("query-guest"))["vcpus"] == 2
        assert await side.refused("query-guest", {"x": 1}) == "query-guest takes no arguments"
        await side.qmp.disconnect()
    print("done")


asyncio.run(main(*sys.argv[1:]))
