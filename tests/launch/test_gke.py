"""The manifests: of the right form, and consistent with each other."""

import pathlib
import re
import string

from kubeflow_trainer_api import models
import pytest
import yaml

GKE = pathlib.Path(__file__).parents[2] / 'launch/gke'
VALUES = {
  'NAME': 'bip',
  'QUEUE': 'research',
  'IMAGE': 'registry/moe_jax:1',
  'CONFIG': 'experiments/paper_64e.py:bip',
  'WORKDIR': 'gs://bucket/runs/bip',
  'ACCELERATOR': 'tpu-v5-lite-podslice',
  'TOPOLOGY': '4x4',
  'HOSTS': '4',
  'CHIPS': '4',
  'QUOTA': '16',
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
  flavor, cluster_queue, queue = manifests('queue', RESOURCE=resource)
  label = manifest['metadata']['labels']['kueue.x-k8s.io/queue-name']
  assert label == queue['metadata']['name']
  assert queue['spec']['clusterQueue'] == cluster_queue['metadata']['name']
  (group,) = cluster_queue['spec']['resourceGroups']
  (offered,) = group['flavors']
  assert offered['name'] == flavor['metadata']['name']
  (quota,) = offered['resources']
  (job,) = manifest['spec']['replicatedJobs']
  (container,) = job['template']['spec']['template']['spec']['containers']
  # Kueue admits no pod that asks for a resource that the queue does not cover.
  assert list(container['resources']['requests']) == group['coveredResources']
  assert container['resources']['requests'] == container['resources']['limits']
  chips = container['resources']['requests'][resource]
  assert job['template']['spec']['parallelism'] * chips == quota['nominalQuota']


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


def test_gpu_pods_find_the_first_of_them():
  (manifest,) = manifests('gpu')
  (job,) = manifest['spec']['replicatedJobs']
  spec = job['template']['spec']
  (container,) = spec['template']['spec']['containers']
  values = {entry['name']: entry.get('value') for entry in container['env']}
  # JobSet's rule: JOBSET-JOB-INDEX_OF_JOB-INDEX_OF_POD.JOBSET
  name = manifest['metadata']['name']
  assert values['JAX_COORDINATOR_ADDRESS'].startswith(
    f'{name}-{job["name"]}-0-0.{name}:'
  )
  assert int(values['JAX_NUM_PROCESSES']) == spec['completions']
  assert spec['completionMode'] == 'Indexed'
