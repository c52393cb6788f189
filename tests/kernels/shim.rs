//! The shim notices what it is there to notice.

use crate::host;

#[test]
fn a_missing_barrier_shows_as_nan() {
    for order in [0, 1, 5] {
        let read = host::missing_barrier(64, order);
        assert!(read.iter().any(|v| v.is_nan()), "order {order}: {read:?}");
    }
}

#[test]
fn a_barrier_that_not_all_reach_is_reported() {
    let error = host::divergent_barrier(64).unwrap_err();
    assert!(error.contains("barrier"), "{error}");
}
