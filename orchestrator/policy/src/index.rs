//! Finds the label queries that match, looking only at those that ask for a label which is there.

use std::collections::{BTreeMap, HashMap};

use crate::spec::Query;

/// Items by their query.
#[derive(Debug)]
pub(crate) struct QueryIndex<'a, T> {
    items: Vec<(Option<&'a Query>, T)>,
    anchored: HashMap<(&'a str, &'a str), Vec<usize>>,
    /// Queries that ask for no label value, such as "all pods" and "without this label".
    rest: Vec<usize>,
}

impl<T> Default for QueryIndex<'_, T> {
    fn default() -> Self {
        Self { items: Vec::new(), anchored: HashMap::new(), rest: Vec::new() }
    }
}

impl<'a, T> QueryIndex<'a, T> {
    /// `None` matches everything.
    pub(crate) fn insert(&mut self, query: Option<&'a Query>, item: T) {
        let place = self.items.len();
        self.items.push((query, item));
        match query.and_then(Query::anchor) {
            Some((key, values)) => {
                for value in values {
                    let places = self.anchored.entry((key, value)).or_default();
                    // `a in (x, x)` is one query.
                    if places.last() != Some(&place) {
                        places.push(place);
                    }
                }
            }
            None => self.rest.push(place),
        }
    }

    /// Items whose query matches, each once, in no order.
    pub(crate) fn matching<'s>(
        &'s self,
        labels: &'s BTreeMap<String, String>,
    ) -> impl Iterator<Item = &'s T> + use<'s, 'a, T> {
        let by_label = labels
            .iter()
            .filter_map(|(key, value)| self.anchored.get(&(key.as_str(), value.as_str())))
            .flatten();
        by_label
            .chain(&self.rest)
            .map(|place| &self.items[*place])
            .filter(|(query, _)| query.is_none_or(|query| query.matches(labels)))
            .map(|(_, item)| item)
    }
}
