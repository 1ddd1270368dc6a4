"""Health check without curl: exit status 0 if an address answers.

health.py http://HOST:PORT/PATH    must answer 200; https:// is checked against /trust/ca.crt
health.py HOST:PORT                must accept a connection
"""

import sys

address = sys.argv[1]
if address.startswith("http"):
    import ssl
    import urllib.request

    context = ssl.create_default_context(cafile="/trust/ca.crt") if address.startswith("https") else None
    urllib.request.urlopen(address, timeout=4, context=context).close()  # raises for any other status
else:
    import socket

    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), timeout=4).close()
