"""From data sets on disk to the micro-batches of a step.

Which samples a step sees depends on the data's order (`DataOrder`: the seed, the data, and how many samples were asked
for) and on the number of samples before it, never on the layout: a run goes on with other data-parallel or micro-batch
sizes where it stopped.
"""

from trainer.data.batches import IGNORED as IGNORED
from trainer.data.batches import Batch as Batch
from trainer.data.batches import Loader as Loader
from trainer.data.batches import Sample as Sample
from trainer.data.batches import Samples as Samples
from trainer.data.batches import sample_numbers as sample_numbers
from trainer.data.checks import check_split as check_split
from trainer.data.checks import check_vocabulary as check_vocabulary
from trainer.data.checks import data_files as data_files
from trainer.data.instruction import InstructionSamples as InstructionSamples
from trainer.data.instruction import instruction_samples as instruction_samples
from trainer.data.order import DataOrder as DataOrder
from trainer.data.pretraining import PretrainingSamples as PretrainingSamples
from trainer.data.pretraining import pretraining_samples as pretraining_samples
from trainer.data.training import TrainingData as TrainingData
from trainer.data.training import training_data as training_data
