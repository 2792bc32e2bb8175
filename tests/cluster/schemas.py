"""What the files of examples/cluster may say: the fields of each API that they use. An unknown field is an error.

Written by hand from the public definitions, so that no repository is copied here:

- Kubeflow Trainer 2: kubeflow/trainer, pkg/apis/trainer/v1alpha1 (trainjob_types.go, trainingruntime_types.go);
- its job sets: kubernetes-sigs/jobset, api/jobset/v1alpha2; its pods: Kubernetes' core/v1 and batch/v1;
- SkyPilot: docs.skypilot.co, "SkyPilot YAML" (reference/yaml-spec) and "Volumes" (reference/volumes).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

API = "trainer.kubeflow.org/v1alpha1"
NAME = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
Name = Annotated[str, StringConstraints(pattern=NAME, max_length=63)]
Quantity = Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+)?([kMGTP]i?|m)?$")]
Whole = Annotated[int, Field(ge=1)]


class Part(BaseModel):
    """No field but those that are named; Kubernetes takes no number for a text."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Part):
    name: Name | None = None
    namespace: Name | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class EnvVar(Part):
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    value: str


class Resources(Part):
    requests: dict[str, Quantity] = {}
    limits: dict[str, Quantity] = {}

    @model_validator(mode="after")
    def devices(self) -> Resources:
        """Kubernetes overcommits no device: a request must equal the limit."""
        for name, amount in self.requests.items():
            if "/" in name and self.limits.get(name) != amount:
                raise ValueError(f"{name}: requests {amount} and limits {self.limits.get(name)} must be equal")
        return self


class Mount(Part):
    name: Name
    mountPath: Annotated[str, StringConstraints(pattern="^/")]


class Claim(Part):
    claimName: Name


class EmptyDir(Part):
    medium: Literal["", "Memory"] = ""
    sizeLimit: Quantity | None = None


class Volume(Part):
    name: Name
    persistentVolumeClaim: Claim | None = None
    emptyDir: EmptyDir | None = None

    @model_validator(mode="after")
    def one_source(self) -> Volume:
        """A volume has exactly one source."""
        if (self.persistentVolumeClaim is None) == (self.emptyDir is None):
            raise ValueError(f"volume {self.name}: expected one source")
        return self


class Container(Part):
    name: Name
    image: str
    workingDir: str | None = None
    volumeMounts: list[Mount] = []


class PodSpec(Part):
    restartPolicy: Literal["Never", "OnFailure"]
    terminationGracePeriodSeconds: Whole
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[Volume] = []

    @model_validator(mode="after")
    def mounts(self) -> PodSpec:
        """Every mount is of a volume of the pod."""
        there = {volume.name for volume in self.volumes}
        for container in self.containers:
            for mount in container.volumeMounts:
                if mount.name not in there:
                    raise ValueError(f"container {container.name} mounts {mount.name}, which is no volume")
        return self


class PodTemplate(Part):
    metadata: Metadata = Metadata()
    spec: PodSpec


class JobSpec(Part):
    backoffLimit: Annotated[int, Field(ge=0)] = 6
    template: PodTemplate


class JobTemplate(Part):
    metadata: Metadata = Metadata()
    spec: JobSpec


class ReplicatedJob(Part):
    name: Name
    template: JobTemplate


class FailurePolicy(Part):
    maxRestarts: Annotated[int, Field(ge=0)]


class JobSetSpec(Part):
    failurePolicy: FailurePolicy | None = None
    replicatedJobs: Annotated[list[ReplicatedJob], Field(min_length=1)]


class JobSetTemplate(Part):
    metadata: Metadata = Metadata()
    spec: JobSetSpec


class Torch(Part):
    numProcPerNode: Literal["auto", "cpu", "gpu"] | Whole = "auto"


class MLPolicy(Part):
    numNodes: Whole = 1
    torch: Torch


class RuntimeSpec(Part):
    mlPolicy: MLPolicy
    template: JobSetTemplate


class TrainingRuntime(Part):
    apiVersion: Literal["trainer.kubeflow.org/v1alpha1"]
    kind: Literal["TrainingRuntime"]
    metadata: Metadata
    spec: RuntimeSpec


class RuntimeRef(Part):
    apiGroup: Literal["trainer.kubeflow.org"] = "trainer.kubeflow.org"
    kind: Literal["TrainingRuntime", "ClusterTrainingRuntime"] = "ClusterTrainingRuntime"
    name: Name


class Trainer(Part):
    image: str | None = None
    command: Annotated[list[str], Field(max_length=128)] = []
    args: Annotated[list[str], Field(max_length=128)] = []
    env: Annotated[list[EnvVar], Field(max_length=128)] = []
    numNodes: Whole
    numProcPerNode: Whole
    resourcesPerNode: Resources


class TrainJobSpec(Part):
    runtimeRef: RuntimeRef
    trainer: Trainer


class TrainJob(Part):
    apiVersion: Literal["trainer.kubeflow.org/v1alpha1"]
    kind: Literal["TrainJob"]
    metadata: Metadata
    spec: TrainJobSpec


class JobRecovery(Part):
    strategy: str | None = None
    max_restarts_on_errors: Annotated[int, Field(ge=0)] = 0


AtLeast = Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+)?\+?$")]


class SkyResources(Part):
    infra: str | None = None
    accelerators: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9-]+:\d+$")]
    cpus: AtLeast | None = None
    memory: AtLeast | None = None
    disk_size: Whole | None = None
    network_tier: Literal["standard", "best"] | None = None
    use_spot: bool = False
    job_recovery: JobRecovery | None = None


class SkyTask(Part):
    name: Name
    workdir: str | None = None
    num_nodes: Whole = 1
    resources: SkyResources
    volumes: dict[Annotated[str, StringConstraints(pattern="^/")], Name] = {}
    envs: dict[str, str | None] = {}
    setup: str = ""
    run: str
