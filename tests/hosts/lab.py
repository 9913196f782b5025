"""Hosts of one machine for tests: network namespaces on a bridge, each with its own address, host name, mounts and sshd.

What is shared is all else, the file system above all, as on a cluster. Only for root, and with Debian's packages.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
IP = shutil.which("ip", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")


def why_not() -> str:
    """What keeps this machine from having hosts; empty if nothing does."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    for program, found in {"sshd (openssh-server)": SSHD, "ip (iproute2)": IP, "ssh": shutil.which("ssh")}.items():
        if not found:
            return f"needs {program}"
    tried = subprocess.run([IP, "netns", "add", f"slm{os.getpid()}try"], capture_output=True, text=True)
    if tried.returncode:
        return f"network namespaces cannot be made here: {tried.stderr.strip()}"
    run(IP, "netns", "del", f"slm{os.getpid()}try")
    return ""


def run(*words) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


class Lab:
    def __init__(self, folder: Path) -> None:
        self.folder, self.tag = folder, f"slm{os.getpid() % 100000}"
        self.subnet = f"10.77.{os.getpid() % 250}"
        self.names: list[str] = []
        self.sshds: list[subprocess.Popen] = []
        Path("/run/sshd").mkdir(exist_ok=True)
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key")
        self.config = folder / "config"
        run(IP, "link", "add", f"{self.tag}br", "type", "bridge")
        run(IP, "address", "add", f"{self.subnet}.254/24", "dev", f"{self.tag}br")
        run(IP, "link", "set", f"{self.tag}br", "up")

    def add(self, name: str, setup: str = "true") -> str:
        """A host `name` of the ssh configuration, with a shell command run in its own mounts before its sshd; its address."""
        number, namespace, end = len(self.names) + 1, f"{self.tag}{name}", f"{self.tag}v{len(self.names)}"
        self.names.append(name)
        address = f"{self.subnet}.{number}"
        run(IP, "netns", "add", namespace)
        run(IP, "link", "add", end, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        run(IP, "link", "set", end, "master", f"{self.tag}br", "up")
        inside = (IP, "-n", namespace)
        run(*inside, "address", "add", f"{address}/24", "dev", "eth0")
        run(*inside, "link", "set", "eth0", "up")
        run(*inside, "link", "set", "lo", "up")
        sshd = self.folder / f"sshd-{name}"
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{sshd}-key")
        sshd.write_text(
            f"HostKey {sshd}-key\nAuthorizedKeysFile {self.folder}/key.pub\nPidFile none\nUsePAM no\nStrictModes no\n"
            "PermitRootLogin yes\nPasswordAuthentication no\n"
        )
        script = f"hostname {name} && {setup} && exec {SSHD} -D -e -f {sshd}"
        words = [IP, "netns", "exec", namespace, "unshare", "--mount", "--uts", "sh", "-c", script]
        with open(f"{sshd}-log", "w") as log:
            self.sshds.append(subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True))
        with open(self.config, "a") as config:
            config.write(
                f"Host {name}\n  HostName {address}\n  User root\n  IdentityFile {self.folder}/key\n  IdentitiesOnly yes\n"
                f"  UserKnownHostsFile {self.folder}/known\n  StrictHostKeyChecking accept-new\n  LogLevel ERROR\n"
            )
        self._wait_for(name)
        return address

    def _wait_for(self, name: str) -> None:
        deadline = time.monotonic() + 20
        while subprocess.run(["ssh", "-F", self.config, name, "true"], capture_output=True).returncode:
            assert time.monotonic() < deadline, (self.folder / f"sshd-{name}-log").read_text()
            time.sleep(0.1)

    @property
    def ssh(self) -> str:
        """For SLM_SSH."""
        return f"ssh -F {self.config}"

    def hostfile(self, *names: str, slots: int = 1) -> Path:
        path = self.folder / f"hosts-{'-'.join(names)}"
        path.write_text("".join(f"{name} slots={slots}\n" for name in names))
        return path

    def pids(self, name: str) -> list[int]:
        """Every process of a host but its sshd."""
        own = self.sshds[self.names.index(name)].pid
        found = [int(pid) for pid in run(IP, "netns", "pids", f"{self.tag}{name}").split()]
        return [pid for pid in found if pid != own]

    def cable(self, name: str, state: str) -> None:
        """Its only link, "down" or "up": a host without power says no word of leaving."""
        run(IP, "link", "set", f"{self.tag}v{self.names.index(name)}", state)

    def run(self, name: str, *words) -> list[str]:
        """The words of a command in a host, without ssh."""
        return [IP, "netns", "exec", f"{self.tag}{name}", *map(str, words)]

    def remove(self) -> None:
        for number, name in enumerate(self.names):
            for pid in [*self.pids(name), self.sshds[number].pid]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            self.sshds[number].wait()
            run(IP, "netns", "del", f"{self.tag}{name}")
        run(IP, "link", "del", f"{self.tag}br")
