//! What is injected where: sigma schedule, layer multipliers, the resolved plan, what was measured.

pub(crate) mod agreement;
pub mod injector;
pub mod measured;
pub mod modules;
pub mod multipliers;
pub mod plan;
pub mod schedule;
pub mod section;
pub mod selection;
