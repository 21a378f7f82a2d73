"""Check examples/kubernetes/*.yaml against published schemas, without a cluster.

    pip install kubeflow-trainer-api jsonschema pyyaml        in an environment of its own
    python tests/kubernetes_schemas.py CRD.yaml...

CRD.yaml: of JobSet (config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml of kubernetes-sigs/jobset) and of Kubeflow
Trainer (manifests/base/crds/*.yaml of kubeflow/trainer). A field that a schema does not know is an error, which the
schemas themselves do not say: their objects are closed here. kubeflow-trainer-api's models read each manifest too.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubeflow_trainer_api.models as models
import yaml

MANIFESTS = Path(__file__).resolve().parents[1] / "examples" / "kubernetes"
MODELS = {"TrainJob": models.TrainerV1alpha1TrainJob, "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
          "JobSet": models.JobsetV1alpha2JobSet, "PersistentVolumeClaim": models.IoK8sApiCoreV1PersistentVolumeClaim}


def closed(schema: Any) -> Any:
    """A schema whose objects with named properties take no others."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    result = {name: closed(part) for name, part in schema.items()}
    if result.pop("x-kubernetes-int-or-string", False):
        result.pop("anyOf", None)
        result["type"] = ["integer", "string"]
    if isinstance(result.get("properties"), dict) and "additionalProperties" not in result:
        result["additionalProperties"] = False
    return result


def unknown_fields(given: Any, read: Any, where: str = "") -> list[str]:
    """Fields that a model has not taken up."""
    if isinstance(given, dict):
        if not isinstance(read, dict):
            return [where]
        return [name for key, part in given.items() for name in (
            unknown_fields(part, read[key], f"{where}.{key}") if key in read else [f"{where}.{key}"])]
    if isinstance(given, list):
        return [name for number, (part, own) in enumerate(zip(given, read, strict=True))
                for name in unknown_fields(part, own, f"{where}[{number}]")]
    return []


def main(crds: list[str]) -> int:
    """Check all manifests; 1 if one of them is wrong."""
    schemas = {}
    for path in crds:
        for crd in yaml.safe_load_all(Path(path).read_text()):
            if crd and crd["kind"] == "CustomResourceDefinition":
                (version,) = [version for version in crd["spec"]["versions"] if version["storage"]]
                schema = closed(version["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = {"type": "object"}
                schemas[crd["spec"]["names"]["kind"]] = f"{crd['spec']['group']}/{version['name']}", schema
    wrong = 0
    for path in sorted(MANIFESTS.glob("*.yaml")):
        for manifest in yaml.safe_load_all(path.read_text()):
            kind, name = manifest["kind"], f"{path.name}: {manifest['kind']} {manifest['metadata']['name']}"
            said = []
            if kind in schemas:
                version, schema = schemas[kind]
                if manifest["apiVersion"] != version:
                    said.append(f"apiVersion {manifest['apiVersion']} is not {version}")
                said += [f"{'/'.join(map(str, error.absolute_path))}: {error.message}"
                         for error in jsonschema.Draft202012Validator(schema).iter_errors(manifest)]
            elif kind != "PersistentVolumeClaim":
                said.append(f"no schema of {kind} was given")
            try:
                read = MODELS[kind].from_dict(copy.deepcopy(manifest))
            except ValueError as error:
                said.append(f"the model refuses it: {error}")
            else:
                said += [f"the model does not know {field}" for field in unknown_fields(manifest, read.to_dict())]
            wrong += len(said)
            print(f"{name}: " + ("; ".join(said) or "as published" + ("" if kind in schemas else " (model alone)")))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
