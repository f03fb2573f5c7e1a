import pickle

import numpy as np
import pytest

from grpo.types import Completion


@pytest.mark.parametrize("dtypes", [(np.int64, np.float32), (np.int32, np.float64)])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_a_completion_comes_through_pickle_in_the_documented_types(tokens, dtypes):
    token_ids, logprobs = np.arange(tokens, dtype=dtypes[0]), np.linspace(-2, 0, tokens, dtype=dtypes[1])
    found = pickle.loads(pickle.dumps(Completion(token_ids, logprobs, ((3, tokens),), "stop")))
    np.testing.assert_array_equal(found.token_ids, token_ids)
    np.testing.assert_array_equal(found.logprobs, logprobs.astype(np.float32))
    assert (found.token_ids.dtype, found.logprobs.dtype) == (np.int64, np.float32)
    assert (found.versions, found.finish_reason) == (((3, tokens),), "stop")
