// The server and the client of a test around the page's identity.js: `main.js server PORT` answers with the name of whoever
// calls, `main.js client URL` asks, once for each line of its input, over a new connection each time.
'use strict';
const https = require('https');
const readline = require('readline');
const { identity, renew } = require('./identity.js');

if (process.argv[2] === 'server') {
  const server = SERVER((request, answer) => {
    const called = request.socket.getPeerCertificate();
    answer.end(`hello ${CALLER} ${BigInt(`0x${called.serialNumber}`)}\n`);
  });
  renew(server);
  server.listen(Number(process.argv[3]), '127.0.0.1');
} else {
  readline.createInterface({ input: process.stdin }).on('line', () => {
    CLIENT((answer) => answer.pipe(process.stdout, { end: false })).on('error', (error) => console.log(error.message));
  });
}
