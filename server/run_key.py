# SPDX-License-Identifier: Apache-2.0
"""The key that signs what a run leaves: one per run, below ``OUT/keys``, for which a consortium may vouch.

.. code-block:: text

    OUT/keys/run.key        Ed25519, PEM, mode 0600; made when it is first needed
    OUT/keys/voucher.json   the consortium's word for it (:func:`vouch_for_run`), for one study; absent in a simulation

In a simulation and a rehearsal nobody vouches: the signature proves that nothing was changed since by someone
without the folder's keys, not who ran it. A person with the consortium's key can sign a release instead
(``fedneuro-server release --config DIR``).
"""

import json
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from ..privacy.identity import replace_file, write_private
from ..privacy.seals import Signer, Voucher, as_text, vouch
from ..privacy.signing import load_signing_key, public_text

__all__ = ["run_signer", "vouch_for_run"]


def run_signer(out: Path, study_hash: str) -> Signer:
    """The key of the run in ``out``, made if need be, with its voucher where there is one for this study.

    Raises:
        BadInput: others can read the key, or it is none.
    """
    path = out / "keys" / "run.key"
    if not path.is_file():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = Ed25519PrivateKey.generate()
        write_private(path, new.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    key = load_signing_key(path)
    try:
        said = json.loads((path.parent / "voucher.json").read_bytes())
        # A folder that is used again keeps its key; a voucher is for one study only.
        return Signer(key, Voucher.model_validate(said["voucher"]) if said["study_hash"] == study_hash else None)
    except (OSError, ValueError, TypeError, KeyError):
        return Signer(key)


def vouch_for_run(out: Path, study_hash: str, coordinator: Ed25519PrivateKey) -> None:
    """Let the run in ``out`` sign in the coordinator's name, for one study; call it when a person launches.

    Args:
        out: the run's folder; it need not hold a run yet.
        study_hash: of the study that is launched.
        coordinator: the consortium's key that signs studies.
    """
    signer = run_signer(out, study_hash)
    voucher = vouch(coordinator, public_text(signer.key), study_hash)
    said = as_text({"study_hash": study_hash, "voucher": voucher.model_dump()})
    replace_file(out / "keys" / "voucher.json", said.encode())
