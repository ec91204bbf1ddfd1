//! Numbers of inner maps. There are not many, so they are used again: as late as possible, and only after the kernel has
//! said that nobody reads what a number meant before.

use std::collections::BTreeSet;
use std::ops::Range;

/// The numbers of one outer map.
pub(super) struct Keys {
    range: Range<u32>,
    used: BTreeSet<u32>,
    next: u32,
}

impl Keys {
    /// Numbers from 1 on, because 0 stands for none, and below `end`; those that are `used` are not given.
    pub(super) fn new(end: u32, used: impl IntoIterator<Item = u32>) -> Self {
        let range = 1..end;
        let used: BTreeSet<u32> = used.into_iter().filter(|key| range.contains(key)).collect();
        let next = used.last().map_or(range.start, |last| last + 1);
        Self { range, used, next }
    }

    /// One that is not used, which it is from now on; `None` if all are.
    pub(super) fn take(&mut self) -> Option<u32> {
        let mut keys = (self.next..self.range.end).chain(self.range.start..self.next);
        let key = keys.find(|key| !self.used.contains(key))?;
        self.used.insert(key);
        self.next = key + 1;
        Some(key)
    }

    /// Those that are used.
    pub(super) fn used(&self) -> &BTreeSet<u32> {
        &self.used
    }

    /// They may be given again.
    pub(super) fn free(&mut self, keys: &[u32]) {
        for key in keys {
            self.used.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_given_again_when_all_others_were() {
        let mut keys = Keys::new(5, [0, 2]);
        assert_eq!(keys.take(), Some(3), "those of an earlier life come first");
        keys.free(&[3]);
        assert_eq!([keys.take(), keys.take(), keys.take()], [Some(4), Some(1), Some(3)]);
        assert_eq!(keys.take(), None, "all are used, and 0 is none");
        keys.free(&[2]);
        assert_eq!(keys.take(), Some(2));
        assert_eq!(keys.used().len(), 4);
    }

    #[test]
    fn numbers_beyond_the_end_are_left_alone() {
        let mut keys = Keys::new(3, [2, 900]);
        assert_eq!((keys.take(), keys.take()), (Some(1), None));
        assert!(!keys.used().contains(&900));
    }
}
