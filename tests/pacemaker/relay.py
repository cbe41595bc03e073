"""A relay between a source and a receiver that loses the connection around the commit."""
import socket
import struct
import threading

# migration/src/wire: a preamble of 64 bytes each way, then frames: type, …, length of the payload at byte 4.
PREAMBLE, HEADER, READY, RUNNING = 64, 32, 8, 10


class Relay:
    """Passes connections on to `to`, until the destination's answer of type `cut`; closed since, until `open`.

    `then` is called when the connection is lost, before the source learns of it.
    """

    def __init__(self, host, to, cut, then=lambda: None):
        self.to, self.cut, self.then, self.closed, self.cuts = to, cut, then, False, 0
        self.server = socket.create_server((host, 0))
        self.uri = f"tcp:{host}:{self.server.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def open(self):
        self.closed = False

    def _serve(self):
        while True:
            source, _ = self.server.accept()
            if self.closed:
                source.close()
                continue
            try:
                destination = socket.create_connection(self.to, 5)
            except OSError:
                source.close()
                continue
            destination.settimeout(None)
            threading.Thread(target=self._forth, args=(source, destination), daemon=True).start()
            threading.Thread(target=self._back, args=(source, destination), daemon=True).start()

    def _forth(self, source, destination):
        try:
            while data := source.recv(1 << 16):
                destination.sendall(data)
        except OSError:
            pass
        self._end(source, destination)

    def _back(self, source, destination):
        def exactly(count):
            data = b""
            while len(data) < count:
                more = destination.recv(count - len(data))
                if not more:
                    raise OSError("the end")
                data += more
            return data
        try:
            source.sendall(exactly(PREAMBLE))
            while True:
                header = exactly(HEADER)
                frame = header + exactly(struct.unpack_from("<I", header, 4)[0])
                if header[0] == self.cut and self.cuts == 0:
                    self.closed, self.cuts = True, 1
                    self.then()
                    # READY arrives, and the commit that answers it does not. RUNNING does not arrive.
                    if self.cut == READY:
                        self._end(destination)
                        source.sendall(frame)
                    break
                source.sendall(frame)
        except OSError:
            pass
        self._end(source, destination)

    @staticmethod
    def _end(*ends):
        for end in ends:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
