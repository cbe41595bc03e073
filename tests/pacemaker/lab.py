"""A Corosync and Pacemaker cluster whose nodes are namespaces of this machine, with a power switch to fence them.

Runs as the first process of a process and network namespace of its own: when it ends, so does every node.
"""
import os
import shutil
import signal
import socket
import subprocess
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))


def sh(*words, check=True, **more):
    """Runs a command and returns its output, both streams together."""
    done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)
    if check and done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: exit {done.returncode}: {done.stdout.strip()}")
    return done.stdout


def stat(pid):
    """The state letter of a process; None if there is none."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0]
    except OSError:
        return None


class Lab:
    """The nodes, by name."""

    # This side of the nodes' network.
    HOST = "10.77.0.254"

    def __init__(self, folder, agent, nodes=2):
        self.folder, self.nodes = folder, [f"node{n + 1}" for n in range(nodes)]
        self.starters, self.lock = {}, threading.RLock()
        # A switch that is broken answers every request to turn a node off with an error.
        self.switch_broken, self.fenced = False, []
        for tool in ("mount --make-rprivate /", "ip link set lo up", "ip link add br0 type bridge",
                     f"ip addr add {self.HOST}/24 dev br0", "ip link set br0 up"):
            sh(*tool.split())
        self._files(agent)
        self._switch()

    def _files(self, agent):
        folder = self.folder
        for sub in ("sbin", "ocf/ferry"):
            os.makedirs(f"{folder}/{sub}")
        shutil.copy(f"{HERE}/fence_lab", f"{folder}/sbin/fence_lab")
        shutil.copy(agent, f"{folder}/ocf/ferry/ferry")
        with open(f"{folder}/hosts", "w") as file:
            file.write("127.0.0.1 localhost\n")
            file.writelines(f"10.77.0.{n + 1} {node}\n" for n, node in enumerate(self.nodes))
        for key in ("host", "guest"):
            sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{folder}/{key}.key")
        # The key may do nothing but what the agent asks for.
        with open(f"{folder}/guest.key.pub") as public, open(f"{folder}/authorized", "w") as file:
            file.write(f'restrict,command="/usr/lib/ocf/resource.d/ferry/ferry door" {public.read()}')
        with open(f"{folder}/sshd_config", "w") as file:
            file.write(
                f"HostKey {folder}/host.key\nAuthorizedKeysFile {folder}/authorized\nStrictModes no\nUsePAM no\n"
                "PasswordAuthentication no\nPermitRootLogin prohibit-password\nPidFile /run/sshd.pid\n"
            )
        corosync = self._corosync()
        secret = os.urandom(256)
        haclient = shutil._get_gid("haclient")
        for node in self.nodes:
            own = f"{folder}/{node}"
            for sub in ("etc/corosync/uidgid.d", "etc/pacemaker", "var/lib/corosync", "var/log/corosync", "var/log/pacemaker"):
                os.makedirs(f"{own}/{sub}")
            sh("cp", "-a", "/var/lib/pacemaker", f"{own}/var/lib/pacemaker")
            with open(f"{own}/etc/corosync/corosync.conf", "w") as file:
                file.write(corosync)
            with open(f"{own}/etc/pacemaker/authkey", "wb") as file:
                file.write(secret)
            os.chown(f"{own}/etc/pacemaker/authkey", -1, haclient)
            shutil.chown(f"{own}/var/log/pacemaker", "hacluster", "haclient")
            # A first CIB: without it the first election waits 20 s (dc-deadtime).
            cib = f"{own}/var/lib/pacemaker/cib"
            for name in os.listdir(cib):
                os.unlink(f"{cib}/{name}")
            with open(f"{cib}/cib.xml", "w") as file:
                file.write(
                    '<cib crm_feature_set="3.16.1" validate-with="pacemaker-3.9" epoch="1" num_updates="0" admin_epoch="0">'
                    '<configuration><crm_config><cluster_property_set id="cib-bootstrap-options">'
                    '<nvpair id="dc-deadtime" name="dc-deadtime" value="2s"/></cluster_property_set></crm_config>'
                    "<nodes/><resources/><constraints/></configuration><status/></cib>"
                )
            os.chmod(f"{cib}/cib.xml", 0o600)
            shutil.chown(f"{cib}/cib.xml", "hacluster", "haclient")

    def _corosync(self):
        nodes = "".join(
            f"  node {{\n    ring0_addr: 10.77.0.{n + 1}\n    name: {node}\n    nodeid: {n + 1}\n  }}\n"
            for n, node in enumerate(self.nodes)
        )
        two = "  two_node: 1\n" if len(self.nodes) == 2 else ""
        return (
            "totem {\n  version: 2\n  cluster_name: ferry\n  transport: knet\n  crypto_cipher: none\n  crypto_hash: none\n"
            f"  token: 2000\n}}\nnodelist {{\n{nodes}}}\nquorum {{\n  provider: corosync_votequorum\n{two}}}\n"
            "system {\n  sched_rr: no\n  move_to_root_cgroup: no\n}\n"
            "logging {\n  to_stderr: no\n  to_syslog: no\n  to_logfile: yes\n  logfile: /var/log/corosync/corosync.log\n}\n"
        )

    # ---- Power -----------------------------------------------------------------------------------------------------

    def _switch(self):
        server = socket.socket(socket.AF_UNIX)
        server.bind(f"{self.folder}/switch")
        server.listen(16)

        def answer(client):
            with client:
                try:
                    action, node = client.makefile().readline().split()
                    reply = self._act(action, node)
                except (OSError, RuntimeError, ValueError) as why:
                    reply = f"error {why}"
                client.sendall(f"{reply}\n".encode())

        def serve():
            while True:
                client, _ = server.accept()
                threading.Thread(target=answer, args=(client,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()

    def _act(self, action, node):
        if action == "status":
            return "ok on" if self.init(node) else "ok off"
        if action == "on":
            self.on(node)
            return "ok"
        if action not in ("off", "reboot"):
            return f"error {action} is unknown"
        if self.switch_broken:
            return "error the switch is broken"
        self.off(node)
        self.fenced.append(node)
        if action == "reboot":
            self.on(node)
        return "ok"

    def init(self, node):
        """The node's first process, as this namespace numbers it; None when it is off."""
        starter = self.starters.get(node)
        if starter is None or starter.poll() is not None:
            return None
        try:
            with open(f"/proc/{starter.pid}/task/{starter.pid}/children") as file:
                return int(file.read().split()[0])
        except (OSError, IndexError):
            return None

    def on(self, node):
        with self.lock:
            if self.init(node):
                return
            number = node[4:]
            with open(f"{self.folder}/{node}/console", "a") as console:
                self.starters[node] = subprocess.Popen(
                    ["unshare", "-m", "-n", "-p", "-u", "-i", "--fork", "--kill-child=KILL", "/bin/bash", f"{HERE}/node", self.folder, number],
                    stdin=subprocess.DEVNULL, stdout=console, stderr=console, start_new_session=True,
                )
            mine = os.readlink("/proc/self/ns/net")
            for _ in range(500):
                init = self.init(node)
                if init and os.readlink(f"/proc/{init}/ns/net") != mine:
                    break
                time.sleep(0.01)
            sh("ip", "link", "add", f"v{number}", "type", "veth", "peer", "name", "eth0", "netns", str(init))
            sh("ip", "link", "set", f"v{number}", "master", "br0", "up")

    def off(self, node):
        """Power loss: every process of the node is gone when this returns."""
        with self.lock:
            init = self.init(node)
            if init:
                os.kill(init, signal.SIGKILL)
                self.starters[node].wait(60)
            sh("ip", "link", "del", f"v{node[4:]}", check=False)

    def processes(self, node):
        init, found = self.init(node), []
        if init is None:
            return found
        namespace = os.readlink(f"/proc/{init}/ns/pid")
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                if os.readlink(f"/proc/{pid}/ns/pid") == namespace:
                    found.append(int(pid))
            except OSError:
                pass
        return found

    def signal(self, node, number, names=None):
        """Signals all processes of a node, or those whose command has one of these names; returns how many."""
        hit = set()
        for _ in range(3):
            for pid in self.processes(node):
                try:
                    with open(f"/proc/{pid}/comm") as file:
                        name = file.read().strip()
                    if names is None or any(name.startswith(n) for n in names):
                        os.kill(pid, number)
                        hit.add(pid)
                except OSError:
                    pass
        return len(hit)

    # ---- Commands --------------------------------------------------------------------------------------------------

    def run(self, node, *words, check=True, timeout=120):
        """Runs a command on a node."""
        return sh("nsenter", "-t", str(self.init(node)), "-m", "-n", "-p", "-u", "-i", "--", *words, check=check, timeout=timeout)
