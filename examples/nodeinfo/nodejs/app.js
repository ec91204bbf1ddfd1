// The tutorial's web server, corrected: answers every request, and leaves on SIGTERM without
// cutting off requests that are under way (node as PID 1 ignores SIGTERM unless it is handled).
'use strict';
const http = require('http');
const os = require('os');

const PORT = 8080;
const LAME_DUCK_MS = 2000;

const server = http.createServer((request, response) => {
  response.writeHead(200, { 'Content-Type': 'text/plain' });
  response.end(`Container Hostname: ${os.hostname()}\n`);
});

server.listen(PORT, () => console.log(`serving on port ${PORT} as ${os.hostname()}`));

for (const signal of ['SIGTERM', 'SIGINT']) {
  process.on(signal, () => {
    setTimeout(() => server.close(() => process.exit(0)), LAME_DUCK_MS);
    setTimeout(() => process.exit(0), LAME_DUCK_MS + 5000).unref();
  });
}
