# SPDX-License-Identifier: Apache-2.0
"""Actors and the wire between them.

`frame` and `message` are sans-I/O; `channel` and `host_link` are where trio begins; the card and
coordinator actors stand on those.  Nothing is re-exported here: import from the module.
"""
