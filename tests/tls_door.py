"""A door with TLS before a server: `python tls_door.py CERTIFICATE KEY HOST PORT` prints the port that it has."""

from __future__ import annotations

import asyncio
import ssl
import sys
from contextlib import suppress


async def carry(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await source.read(65536):
            target.write(data)
            await target.drain()
    target.close()


async def main(certificate: str, key: str, host: str, port: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    async def serve(inner: asyncio.StreamReader, answers: asyncio.StreamWriter) -> None:
        outer, asked = await asyncio.open_connection(host, int(port))
        await asyncio.gather(carry(inner, asked), carry(outer, answers))

    async with await asyncio.start_server(serve, "127.0.0.1", ssl=context) as door:
        sys.stdout.write(f"{door.sockets[0].getsockname()[1]}\n")
        sys.stdout.flush()
        await door.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
