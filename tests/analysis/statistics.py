"""Tests, intervals and quantiles of scipy and statsmodels for the cases on stdin, as JSON on stdout."""
import json
import sys

import numpy
from scipy import stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint


def mid_p(b, c):
    n, least = b + c, min(b, c)
    return 1.0 if b == c else 2 * stats.binom.cdf(least, n, 0.5) - stats.binom.pmf(least, n, 0.5)


def t_interval(values):
    return [float(x) for x in stats.t.interval(0.95, len(values) - 1, numpy.mean(values), stats.sem(values))]


def two_way(one, other):
    """Difference and standard error from the mean squares of an analysis of variance without replicates."""
    values = numpy.array(one, float) - numpy.array(other, float)
    seeds, questions = values.shape
    place = numpy.indices(values.shape)
    data = {"y": values.ravel(), "seed": place[0].ravel(), "question": place[1].ravel()}
    table = anova_lm(ols("y ~ C(seed) + C(question)", data).fit())
    squares = table["mean_sq"] / values.size
    of_seeds, of_questions, left = squares["C(seed)"], squares["C(question)"], squares["Residual"]
    total = max(of_seeds + of_questions - left, of_seeds, of_questions)
    return [float(values.mean()), float(numpy.sqrt(total))]


def seeds_alone(one, other):
    """Standard error and degrees of freedom of Welch's t test of two arms' accuracies."""
    one, other = (numpy.mean(numpy.array(marks, float), axis=1) for marks in (one, other))
    result = stats.ttest_ind(one, other, equal_var=False)
    return [float((one.mean() - other.mean()) / result.statistic), float(result.df)]


cases = json.load(sys.stdin)
json.dump(
    {
        "mcnemar": [
            [float(mcnemar([[0, b], [c, 0]], exact=True).pvalue), float(mid_p(b, c))] for b, c in cases["mcnemar"]
        ],
        "wilson": [[float(x) for x in proportion_confint(k, n, method="wilson")] for k, n in cases["wilson"]],
        "two_sided": [float(2 * stats.t.sf(t, v)) for t, v in cases["two_sided"]],
        "quantile": [float(stats.t.ppf(p, v)) for p, v in cases["quantile"]],
        "holm": [[float(p) for p in multipletests(ps, method="holm")[1]] for ps in cases["holm"]],
        "t_interval": [t_interval(values) for values in cases["t_interval"]],
        "welch": [seeds_alone(one, other) for one, other in cases["two_way"]],
        "two_way": [two_way(one, other) for one, other in cases["two_way"]],
    },
    sys.stdout,
)
