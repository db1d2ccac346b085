"""The manifests: of the right form, and consistent with each other."""

import inspect
import pathlib
import re
import string

import jax
from jax._src.clusters import cloud_tpu_cluster
from jaxlib import xla_client
from kubeflow_trainer_api import models
import pytest
import yaml

from moe_jax.runs import processes

GKE = pathlib.Path(__file__).parents[2] / 'launch/gke'
VALUES = {
  'NAME': 'midpoint',
  'QUEUE': 'research',
  'IMAGE': 'registry/moe_jax:1',
  'CONFIG': 'experiments/pods/paper_64e.py:midpoint_t1',
  'WORKDIR': 'gs://bucket/runs/midpoint',
  'CACHE': 'gs://bucket/compiled',
  'ACCELERATOR': 'tpu-v5-lite-podslice',
  'TOPOLOGY': '4x4',
  'SLICES': '2',
  'HOSTS': '4',
  'CHIPS': '4',
}
RESOURCES = {'tpu': 'google.com/tpu', 'gpu': 'nvidia.com/gpu'}


def manifests(name: str, **values: str) -> list[dict]:
  """Returns the documents of a file as kubectl gets them from envsubst."""
  text = (GKE / f'{name}.yaml').read_text()
  filled = string.Template(text).substitute(VALUES | values)
  return list(yaml.safe_load_all(filled))


@pytest.mark.parametrize('name', ['tpu', 'gpu', 'queue'])
def test_header_names_the_variables(name):
  text = (GKE / f'{name}.yaml').read_text()
  comment, _, body = text.partition('\napiVersion')
  exports = ' '.join(re.findall('export (.*)', comment))
  assert set(re.findall(r'\b([A-Z]+)=', exports)) == set(
    re.findall(r'\$\{(\w+)\}', body)
  )


@pytest.mark.parametrize('name', ['tpu', 'gpu'])
def test_job_set_has_no_unknown_field_and_no_wrong_type(name):
  (manifest,) = manifests(name)
  job_set = models.JobsetV1alpha2JobSet.from_dict(manifest)
  # An unknown field is lost on the way there and back.
  assert job_set.to_dict() == manifest


@pytest.mark.parametrize('name', ['tpu', 'gpu'])
def test_queue_admits_all_pods_of_a_job_set(name):
  (manifest,) = manifests(name)
  resource = RESOURCES[name]
  quota = {'tpu': '32', 'gpu': '16'}[name]
  flavor, cluster_queue, queue = manifests(
    'queue', RESOURCE=resource, QUOTA=quota
  )
  label = manifest['metadata']['labels']['kueue.x-k8s.io/queue-name']
  assert label == queue['metadata']['name']
  assert queue['spec']['clusterQueue'] == cluster_queue['metadata']['name']
  (group,) = cluster_queue['spec']['resourceGroups']
  (offered,) = group['flavors']
  assert offered['name'] == flavor['metadata']['name']
  quotas = {each['name']: each['nominalQuota'] for each in offered['resources']}
  (job,) = manifest['spec']['replicatedJobs']
  (container,) = job['template']['spec']['template']['spec']['containers']
  requests, limits = container['resources'].values()
  # Kueue admits no pod that asks for a resource that the queue does not cover.
  assert list(requests) == list(quotas) == group['coveredResources']
  # Devices are not shared: Kubernetes wants both to be equal.
  assert limits == {resource: requests[resource]}
  pods = job['replicas'] * job['template']['spec']['parallelism']
  assert pods * requests[resource] == quotas[resource]


@pytest.mark.parametrize('name', ['tpu', 'gpu'])
def test_pods_run_the_one_command(name):
  (manifest,) = manifests(name)
  (job,) = manifest['spec']['replicatedJobs']
  (container,) = job['template']['spec']['template']['spec']['containers']
  assert container['command'] == ['python', '-m', 'moe_jax.main']
  assert container['args'] == [
    f'--config={VALUES["CONFIG"]}',
    f'--workdir={VALUES["WORKDIR"]}',
  ]


def environment(container: dict) -> dict[str, str]:
  return {entry['name']: entry.get('value') for entry in container['env']}


@pytest.mark.parametrize('name', ['tpu', 'gpu'])
def test_jax_knows_what_the_environment_sets(name):
  (manifest,) = manifests(name)
  (job,) = manifest['spec']['replicatedJobs']
  (container,) = job['template']['spec']['template']['spec']['containers']
  read = inspect.getsource(processes) + inspect.getsource(xla_client)
  for variable in environment(container):
    if variable.startswith(('JAX_', 'XLA_')):
      is_option = variable.lower() in jax.config.values
      assert is_option or f"'{variable}'" in read, variable


@pytest.mark.parametrize('name', ['tpu', 'gpu'])
def test_restarted_pods_find_what_was_made_before(name):
  (manifest,) = manifests(name)
  (job,) = manifest['spec']['replicatedJobs']
  spec = job['template']['spec']['template']['spec']
  (container,) = spec['containers']
  values = environment(container)
  assert values['JAX_COMPILATION_CACHE_DIR'] == VALUES['CACHE']
  mounts = {m['mountPath']: m['name'] for m in container['volumeMounts']}
  volumes = {volume.pop('name'): volume for volume in spec['volumes']}
  # Neither with the container nor with the pod does it end.
  assert 'hostPath' in volumes[mounts[values['XDG_CACHE_HOME']]]


def test_every_slice_is_a_job_with_a_node_pool_of_its_own():
  (manifest,) = manifests('tpu')
  (job,) = manifest['spec']['replicatedJobs']
  assert job['replicas'] == int(VALUES['SLICES'])
  assert job['template']['spec']['completions'] == int(VALUES['HOSTS'])
  (alone,) = manifest['metadata']['annotations'].values()
  assert alone == 'cloud.google.com/gke-nodepool'


@pytest.mark.parametrize('slices', [1, 2])
def test_jax_counts_the_hosts_of_all_slices(slices, monkeypatch):
  """From what GKE tells pods, so that the manifest needs to say nothing."""
  tpu = cloud_tpu_cluster
  monkeypatch.setattr(tpu, 'running_in_cloud_tpu_vm', True)
  monkeypatch.setattr(tpu, 'get_tpu_env_value_from_metadata', lambda key: None)
  monkeypatch.setenv('TPU_WORKER_HOSTNAMES', 'a,b,c,d')
  found = []
  for index in range(slices):
    if slices > 1:
      monkeypatch.setenv('MEGASCALE_NUM_SLICES', f'{slices}')
      monkeypatch.setenv('MEGASCALE_SLICE_ID', f'{index}')
      monkeypatch.setenv('MEGASCALE_COORDINATOR_ADDRESS', 'first:8080')
    for worker in range(4):
      monkeypatch.setenv('TPU_WORKER_ID', f'{worker}')
      found.append(processes._detected())
  count = 4 * slices
  assert found == [
    {'num_processes': count, 'process_id': i} for i in range(count)
  ]


def test_gpu_pods_find_the_first_of_them():
  (manifest,) = manifests('gpu')
  (job,) = manifest['spec']['replicatedJobs']
  spec = job['template']['spec']
  (container,) = spec['template']['spec']['containers']
  values = environment(container)
  # JobSet's rule: JOBSET-JOB-INDEX_OF_JOB-INDEX_OF_POD.JOBSET
  name = manifest['metadata']['name']
  assert values['JAX_COORDINATOR_ADDRESS'].startswith(
    f'{name}-{job["name"]}-0-0.{name}:'
  )
  assert int(values['JAX_NUM_PROCESSES']) == spec['completions']
  assert spec['completionMode'] == 'Indexed'
