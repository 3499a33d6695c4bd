# SPDX-License-Identifier: Apache-2.0
"""What the operator of a SuperLink does, without starting Flower's command line for each step.

Each call is one request of Flower's Control API, the same that ``flwr supernode register``, ``flwr supernode
list`` and ``flwr run`` send; those commands take two seconds each to start.
"""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import httpx

from ..privacy.errors import EnvironmentProblem

__all__ = ["Control", "NodeState"]


@dataclass(frozen=True, slots=True)
class NodeState:
    """A node as the SuperLink sees it; ``heard``: its last heartbeat or its end, in seconds since 1970, 0: never."""

    name: str
    online: bool
    heard: float


class Control:
    """The Control API of one SuperLink.

    Args:
        address: host:port.
        authority: PEM file of the authority that vouches for it.
    """

    def __init__(self, address: str, authority: Path) -> None:
        from flwr.supercore.control import ControlHttpClient
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

        self._address = address
        self._context = ssl.create_default_context(cafile=str(authority))
        version = RuntimeVersionHttpInterceptor(component_name="flwr CLI")
        self._client = ControlHttpClient.from_server_address(
            address, False, authority.read_bytes(), interceptors=[version]
        )

    def is_healthy(self) -> bool:
        """Whether the SuperLink answers."""
        try:
            return httpx.get(f"https://{self._address}/health", verify=self._context).is_success
        except httpx.TransportError:
            return False

    def register(self, public_key: bytes, name: str) -> int:
        """Admit the node with this key under ``name``; returns its id.

        Raises:
            EnvironmentProblem: the SuperLink refuses.
        """
        from flwr.proto.control_pb2 import RegisterNodeRequest

        try:
            return int(self._client.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name)).node_id)
        except httpx.HTTPError as error:
            raise EnvironmentProblem(f"the SuperLink does not register node {name}: {error}") from error

    def unregister(self, node_id: int) -> None:
        """Put a node out; requests to it fail at once."""
        from flwr.proto.control_pb2 import UnregisterNodeRequest

        self._client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))

    def registered(self) -> dict[str, int]:
        """Name and id of every node that is registered, online or not."""
        from flwr.proto.control_pb2 import ListNodesRequest

        nodes = self._client.ListNodes(ListNodesRequest()).nodes_info
        return {node.name: node.node_id for node in nodes if node.status != "unregistered"}

    def online(self) -> set[str]:
        """Names of the nodes that are online."""
        from flwr.proto.control_pb2 import ListNodesRequest

        return {node.name for node in self._client.ListNodes(ListNodesRequest()).nodes_info if node.status == "online"}

    def nodes(self) -> list[NodeState]:
        """Every node that is registered, and when it was last heard of."""
        from flwr.common.constant import HEARTBEAT_PATIENCE
        from flwr.proto.control_pb2 import ListNodesRequest

        found = []
        for node in self._client.ListNodes(ListNodesRequest()).nodes_info:
            ended = node.last_deactivated_at
            heard = datetime.fromisoformat(ended).timestamp() if ended else 0.0
            if node.status == "online":  # Flower keeps until when it believes this, not when it heard it
                heard = node.online_until - HEARTBEAT_PATIENCE * node.heartbeat_interval
            if node.status != "unregistered":
                found.append(NodeState(node.name, node.status == "online", heard))
        return found

    def start_run(self, bundle: bytes, settings: Mapping[str, str | int]) -> int:
        """Submit a run of ``bundle`` with these settings; returns its id.

        Raises:
            EnvironmentProblem: the SuperLink refuses.
        """
        from flwr.common.serde import fab_to_proto, user_config_to_proto
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.supercore.fab import Fab

        request = StartRunRequest(
            fab=fab_to_proto(Fab("", bundle, {})), override_config=user_config_to_proto(dict(settings))
        )
        try:
            response = self._client.StartRun(request)
        except httpx.HTTPError as error:
            raise EnvironmentProblem(f"the SuperLink does not start the run: {error}") from error
        return int(response.run_id)

    def is_over(self, flower_run: int) -> bool:
        """Whether a submitted run has ended, or is not known: no process will take it up any more."""
        from flwr.proto.control_pb2 import ListRunsRequest

        try:
            found = self._client.ListRuns(ListRunsRequest(run_id=flower_run)).run_dict
        except httpx.HTTPStatusError as error:
            if error.response.status_code in (400, 404):
                return True
            raise
        return flower_run not in found or found[flower_run].status.status == "finished"

    def close(self) -> None:
        """Release the connection."""
        self._client.close()
