"""Looks at every VMM of a guest on every node, from outside, and says when two run it at once."""
import http.client
import json
import os
import socket
import threading
import time

from lab import stat


class OverUnix(http.client.HTTPConnection):
    """HTTP on a Unix socket."""

    def __init__(self, path):
        super().__init__("localhost", timeout=2)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


def ask(pid, api):
    """What a VMM says of itself; None if it does not answer."""
    connection = OverUnix(f"/proc/{pid}/root{api}")
    try:
        connection.request("GET", "/v1/status")
        return json.loads(connection.getresponse().read())
    except (OSError, ValueError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def vmms(api):
    """The processes that are a VMM with this control socket: their ids, and whether they booted the guest."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                words = file.read().split(b"\0")
        except OSError:
            continue
        if len(words) > 2 and words[1] in (b"run", b"receive") and api.encode() in words:
            found[int(pid)] = words[1] == b"run"
    return found


class Witness(threading.Thread):
    """Samples a guest's VMMs until the program ends."""

    def __init__(self, name):
        super().__init__(daemon=True)
        self.api = f"/run/ferry/{name}.sock"
        self.boots, self.twice, self.samples = set(), [], 0
        self.states, self.since = {}, {}

    def state(self, pid):
        """A VMM's state; of one that is frozen, and may go on at any time, the last that was seen."""
        if stat(pid) == "T":
            return self.states.get(pid)
        said = ask(pid, self.api)
        if said is not None:
            self.states[pid] = said["state"]
        # Without an answer it may run all the same; a process that has ended does not.
        return self.states.get(pid) if stat(pid) not in (None, "Z") else None

    def owners(self, among):
        """Those that run the guest. A source that has just committed says `migrating` until it has its answer."""
        found, now = [], time.monotonic()
        for pid in among:
            state = self.state(pid)
            if state != "migrating":
                self.since.pop(pid, None)
            began = self.since.setdefault(pid, now) if state == "migrating" else now
            if state in ("running", "paused") or now - began > 30:
                found.append(pid)
        return found

    def sample(self):
        here = vmms(self.api)
        self.boots |= {pid for pid, booted in here.items() if booted}
        first = self.owners(here)
        # They were asked one after the other, and the guest may have moved between: ask again, in turn. Who owned it
        # both times owned it in between, when the others were asked.
        both = [pid for pid in self.owners(first) if pid in first] if len(first) > 1 else first
        if len(both) > 1:
            self.twice.append((time.time(), {pid: self.states.get(pid) for pid in both}))
        self.samples += 1
        return both

    def run(self):
        while True:
            self.sample()
            time.sleep(0.05)
