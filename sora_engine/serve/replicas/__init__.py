"""Several servers behind one address: `sora serve --replicas N`, and Ray Serve for many machines.

`Proxy` is the ASGI application that clients reach. It keeps nothing: an id names the server whose
job it is, and lists are merged as they are asked for. `homes` are the servers as it sees them,
`children` those that are processes of this machine.
"""
