"""Who may connect to experiments.serve, and where: keys, host names, the number of connections, the sockets.

Nothing here imports MindSpore: wrong flags and a port that is taken are answered before the model is loaded.
"""

import ipaddress
import os
import resource
import socket

from qwen3.json_files import read_text

LOOPBACK = ("127.0.0.1", "localhost", "::1")
KEY_CHARACTERS = 16
SPARE_FILES = 64  # open files that are kept for the model, logs and libraries


def connection_limit(asked):
    """The most connections: `asked`, or fewer where the process's limit of open files leaves room for fewer. Raises ValueError for none."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    room = files - SPARE_FILES if files != resource.RLIM_INFINITY else asked
    if room < 1:
        raise ValueError(f"the limit of open files, {files}, leaves no room for connections; raise it with `ulimit -n 1024`")
    return min(asked, room)


def bind(host, port):
    """Returns sockets that are bound to all addresses of the host, for http.serve. They do not listen yet: a client that connects while the
    model is loaded is refused at once. Raises ValueError for an address that cannot be had, such as a port that is taken."""
    sockets = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
            sockets.append(socket.socket(family))
            sockets[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sockets[-1].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sockets[-1].setblocking(False)
            sockets[-1].bind(address)
    except (OSError, UnicodeError) as error:
        for one in sockets:
            one.close()
        raise ValueError(f"--host={host} --port={port}: {getattr(error, 'strerror', error)}; give another address or port") from error
    return sockets


def names(host):
    """Returns the host names that requests may name: the loopback's for a server on the loopback, else None, which accepts any.

    Every address that `host` stands for must be one of the loopback, such as 127.0.0.2 or a name in /etc/hosts.
    """
    try:
        found = {ipaddress.ip_address(address[0].partition("%")[0]) for *_, address in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):  # an address that cannot be listened on; that is said where it is tried
        return LOOPBACK
    own = tuple(str(address) for address in found if str(address) not in LOOPBACK)
    return (*LOOPBACK, *own, *({host.lower()} - {*LOOPBACK, *own})) if all(address.is_loopback for address in found) else None


def read_keys(path):
    """Returns the API keys of a file, one a line; () without a file. Raises ValueError for a key that is short enough to guess."""
    if path is None:
        return ()
    lines = read_text(os.path.expanduser(path)).splitlines()
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys or min(map(len, keys)) < KEY_CHARACTERS:
        raise ValueError(
            f"--api_key_file={path}: give keys of {KEY_CHARACTERS} characters or more, one a line, as `openssl rand -hex 32` makes"
        )
    return keys
