//! Which sequence stands in which row of the batch: sequences take rows as they begin and free them as they end.

use super::{Completion, Prompt, Request};
use crate::Result;

/// Free rows are carried along while there is less than one for so many rows. On a GPU dropping them moves the cache and captures a
/// graph anew, which takes as long as several steps, and the fewer rows there are, the less a step gains by it.
fn rows_per_free_row(on_gpu: bool, rows: usize) -> usize {
    match (on_gpu, rows) {
        (false, _) => 8,
        (true, 129..) => 4,
        (true, _) => 2,
    }
}

/// A sequence at work.
pub struct Active {
    pub place: usize, // in the result
    pub completion: Completion,
}

/// The batch on the host.
pub struct Rows<'a> {
    request: &'a Request<'a>,
    on_gpu: bool,
    active: Vec<Option<Active>>, // of each row; None: free
    free_keys: Vec<u64>,         // of each row, what its products draw from while it is free
    waiting: usize,              // the next prompt to begin
    done: Vec<Option<Completion>>,
}

impl<'a> Rows<'a> {
    /// All rows free: as many as sequences may be at work at once, in whole groups.
    pub fn new(request: &'a Request<'a>, on_gpu: bool) -> Rows<'a> {
        let (group, prompts) = (request.group_size, request.prompts.len());
        let groups = request.batching.max_sequences.map_or(prompts, |most| (most / group).clamp(1, prompts.max(1)));
        let rows = groups.min(prompts) * group;
        Rows {
            request,
            on_gpu,
            active: (0..rows).map(|_| None).collect(),
            free_keys: vec![0; rows],
            waiting: 0,
            done: (0..prompts * group).map(|_| None).collect(),
        }
    }

    pub fn len(&self) -> usize {
        self.active.len()
    }

    pub fn of(&self, row: usize) -> Option<&Active> {
        self.active[row].as_ref()
    }

    /// Prompts that begin now, with the rows of their members: as many whole groups as there are free rows.
    pub fn begin(&mut self) -> Vec<(&'a Prompt, Vec<usize>)> {
        let group = self.request.group_size;
        let mut free = (0..self.active.len()).filter(|&row| self.active[row].is_none()).collect::<Vec<_>>().into_iter();
        let mut begun = Vec::new();
        while free.len() >= group
            && let Some(prompt) = self.request.prompts.get(self.waiting)
        {
            let rows: Vec<usize> = free.by_ref().take(group).collect();
            for (member, &row) in rows.iter().enumerate() {
                let completion = Completion::new(prompt, member);
                self.active[row] = Some(Active { place: self.waiting * group + member, completion });
            }
            begun.push((prompt, rows));
            self.waiting += 1;
        }
        begun
    }

    /// The key that a free row computes under: it goes on where its sequence ended, since noise is measured over all rows, and
    /// the error of that measurement is known for draws of which each is another.
    pub fn free_key(&self, row: usize) -> u64 {
        self.free_keys[row]
    }

    /// Gives the sequence of `row` its next token; true when that ended it. A free row's token is nobody's.
    pub fn push(&mut self, row: usize, id: u32, logprob: f32) -> Result<bool> {
        let Some(active) = &mut self.active[row] else {
            self.free_keys[row] += 1;
            return Ok(false);
        };
        let limit = self.request.limit(active.place);
        if !active.completion.push(id, logprob, limit, self.request.stop_ids)? {
            return Ok(false);
        }
        if let Some(Active { place, completion }) = self.active[row].take() {
            self.free_keys[row] = completion.sequence.key(completion.sequence.ids.len() - 1)?;
            self.done[place] = Some(completion);
        }
        Ok(true)
    }

    /// Drops free rows once there are many and no prompt waits for them; the rows that were kept, in their order.
    pub fn compact(&mut self) -> Option<Vec<usize>> {
        let kept: Vec<usize> = (0..self.active.len()).filter(|&row| self.active[row].is_some()).collect();
        let free = self.active.len() - kept.len();
        let few = free == 0 || free * rows_per_free_row(self.on_gpu, self.active.len()) < self.active.len();
        if few || kept.is_empty() || self.waiting < self.request.prompts.len() {
            return None;
        }
        self.active.retain(Option::is_some);
        self.free_keys = kept.iter().map(|&row| self.free_keys[row]).collect();
        Some(kept)
    }

    pub fn finished(&self) -> bool {
        self.waiting == self.request.prompts.len() && self.active.iter().all(Option::is_none)
    }

    /// In the order of the request.
    pub fn into_completions(self) -> Vec<Completion> {
        self.done.into_iter().flatten().collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::model::generate::{Batching, Sampling};
    use crate::model::pass::PromptUid;

    fn prompts(n: u32) -> Vec<Prompt> {
        (0..n).map(|i| Prompt { uid: PromptUid { step: 1, dataset_index: i }, ids: vec![7; 3] }).collect()
    }

    /// Five prompts in groups of two over at most five rows: two groups at once, refilled as rows come free.
    #[test]
    fn rows_are_taken_freed_refilled_and_dropped() {
        let (prompts, sampling) = (prompts(5), Sampling::greedy());
        let limits = [1, 3, 2, 2, 1, 1, 4, 4, 1, 2];
        let request = Request {
            limits: Some(&limits),
            batching: Batching { max_sequences: Some(5), ..Batching::default() },
            ..Request::new(&prompts, 2, 0, &[], &sampling)
        };
        let mut rows = Rows::new(&request, false);
        assert_eq!(rows.len(), 4);
        let (mut begun, mut steps, mut kept) = (Vec::new(), 0, Vec::new());
        while !rows.finished() {
            begun.extend(rows.begin().into_iter().map(|(prompt, rows)| (steps, prompt.uid.dataset_index, rows)));
            for row in 0..rows.len() {
                rows.push(row, 9, 0.0).unwrap();
            }
            steps += 1;
            kept.extend(rows.compact().map(|rows| (steps, rows)));
        }
        let expected =
            [(0, 0, vec![0, 1]), (0, 1, vec![2, 3]), (2, 2, vec![0, 2]), (3, 3, vec![0, 1]), (3, 4, vec![2, 3])];
        assert_eq!(begun, expected);
        assert_eq!(kept, [(4, vec![0, 1, 3]), (5, vec![0, 1])]);
        let done = rows.into_completions();
        assert_eq!(done.iter().map(|c| c.logprobs.len()).collect::<Vec<_>>(), limits);
        assert!(done.iter().enumerate().all(|(i, c)| c.sequence.uid.dataset_index as usize == i / 2));
        assert!(done.iter().enumerate().all(|(i, c)| c.sequence.member as usize == i % 2));
    }

    /// 640 sequences that end one by one: graphs are captured 12 times on a GPU, not 37.
    #[test]
    fn a_gpu_drops_rows_seldom() {
        let (prompts, sampling) = (prompts(640), Sampling::greedy());
        let limits: Vec<usize> = (1..=640).collect();
        let request = Request { limits: Some(&limits), ..Request::new(&prompts, 1, 0, &[], &sampling) };
        let dropped = |on_gpu| {
            let (mut rows, mut times) = (Rows::new(&request, on_gpu), 0);
            while !rows.finished() {
                rows.begin();
                for row in 0..rows.len() {
                    rows.push(row, 9, 0.0).unwrap();
                }
                times += usize::from(rows.compact().is_some());
            }
            times
        };
        assert_eq!((dropped(true), dropped(false)), (12, 37));
    }
}
